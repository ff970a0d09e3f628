"""A small network camera for tests: serves one clip over RTSP. Run by the system's Python, which has GStreamer.

    /usr/bin/python3 rtsp_server.py PORT CLIP.mp4 [--user NAME --password WORD] [--audio]

The clip (H.264 in MP4) is played in real time from its start for each connection, at rtsp://127.0.0.1:PORT/cam. Prints
"ready" when it listens. SIGUSR1 freezes the picture while the connection, and the sound if there is any, goes on.
"""

from __future__ import annotations

import argparse
import signal
import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

VIDEO = "filesrc location={clip} ! qtdemux ! h264parse ! rtph264pay name=pay0 pt=96 config-interval=1"
AUDIO = " audiotestsrc is-live=true ! alawenc ! rtppcmapay name=pay1 pt=8"


class Camera:
    """Owns the server and knows whether the picture is frozen."""

    def __init__(self, port: int, clip: str, *, audio: bool) -> None:
        self.frozen = False
        self._factory = GstRtspServer.RTSPMediaFactory()
        self._factory.set_launch(f"( {VIDEO.format(clip=clip)}{AUDIO if audio else ''} )")
        self._factory.connect("media-configure", self._watch_picture)
        self._server = GstRtspServer.RTSPServer()
        self._server.set_address("127.0.0.1")
        self._server.set_service(str(port))
        self._server.get_mount_points().add_factory("/cam", self._factory)

    def require(self, user: str, password: str) -> None:
        """Ask everyone for a name and a password."""
        auth = GstRtspServer.RTSPAuth()
        token = GstRtspServer.RTSPToken()
        token.set_string("media.factory.role", "viewer")
        auth.add_basic(GstRtspServer.RTSPAuth.make_basic(user, password), token)
        self._server.set_auth(auth)
        self._factory.add_role_from_structure(
            Gst.Structure.new_from_string("viewer,media.factory.access=true,media.factory.construct=true")
        )

    def serve(self) -> None:
        """Serve until killed."""
        loop = GLib.MainLoop()
        GLib.unix_signal_add(GLib.PRIORITY_HIGH, signal.SIGUSR1, self._freeze)
        GLib.unix_signal_add(GLib.PRIORITY_HIGH, signal.SIGTERM, loop.quit)
        if self._server.attach(None) == 0:
            sys.exit("the port is taken")
        print("ready", flush=True)
        loop.run()

    def _freeze(self) -> bool:
        self.frozen = True
        return True

    def _watch_picture(self, _factory: object, media: GstRtspServer.RTSPMedia) -> None:
        pad = media.get_element().get_by_name("pay0").get_static_pad("src")
        pad.add_probe(Gst.PadProbeType.BUFFER | Gst.PadProbeType.BUFFER_LIST, self._pass_or_drop)

    def _pass_or_drop(self, _pad: Gst.Pad, _probe: Gst.PadProbeInfo) -> Gst.PadProbeReturn:
        return Gst.PadProbeReturn.DROP if self.frozen else Gst.PadProbeReturn.OK


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("clip")
    parser.add_argument("--user", default="")
    parser.add_argument("--password", default="")
    parser.add_argument("--audio", action="store_true")
    asked = parser.parse_args()
    Gst.init(None)
    camera = Camera(asked.port, asked.clip, audio=asked.audio)
    if asked.user:
        camera.require(asked.user, asked.password)
    camera.serve()


if __name__ == "__main__":
    main()
