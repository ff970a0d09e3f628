"""RestorerRouter: which restorer a crop goes to, judged by the crop's quality alone."""

from __future__ import annotations

from streamer.types import Crop, Quality, Route

NONE = "none"


class RestorerRouter:
    """A rule until scores are fitted: what is large and clean goes out as it is, all else to the one restorer."""

    def __init__(
        self,
        restorer: str,
        *,
        max_size: int,
        least_scale: int = 1,
        clean_height_px: float = 64.0,
        clean_noise: float = 4.0,
        clean_blockiness: float = 0.15,
        clean_sharpness: float = 0.45,
    ) -> None:
        """`least_scale` is the restorer's smallest: what would exceed `max_size` even so is not restored.

        Clean is what is at most so noisy and blocky, and at least so sharp.
        An over-compressed H.264 is deblocked, and shows as blur. The bounds tell the two films of carphone apart.
        """
        self._restorer = restorer
        self._max_size = max_size
        self._least_scale = least_scale
        self._clean_height_px = clean_height_px
        self._clean_noise = clean_noise
        self._clean_blockiness = clean_blockiness
        self._clean_sharpness = clean_sharpness

    def route(self, crop: Crop) -> Route:
        """Return where the crop goes, with the reason in a sentence."""
        if self._restorer == NONE:
            return Route(NONE, "no restorer is configured")
        side, quality = max(crop.image.shape[:2]), crop.quality
        least = self._least_scale * side
        if least > self._max_size:
            grown = "" if least == side else f", {least} when restored"
            return Route(NONE, f"the crop is {side} px{grown}, larger than max_size {self._max_size}")
        told = (
            f"face {quality.face_height_px:.0f} px, sharpness {quality.sharpness:.2f}, noise {quality.noise:.1f}, "
            f"blockiness {quality.blockiness:.2f}"
        )
        if quality.face_height_px >= self._clean_height_px and self._is_clean(quality):
            return Route(NONE, f"large and clean: {told}")
        return Route(self._restorer, told)

    def _is_clean(self, quality: Quality) -> bool:
        return (
            quality.noise <= self._clean_noise
            and quality.blockiness <= self._clean_blockiness
            and quality.sharpness >= self._clean_sharpness
        )
