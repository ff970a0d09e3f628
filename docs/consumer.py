"""Embed the faces that a streamer publishes: python consumer.py tcp://127.0.0.1:5556 RECOGNISER.onnx"""

import json
import sys

import cv2
import numpy as np
import onnxruntime
import zmq

# Where the recogniser wants eyes, nose and mouth corners, as shares of its side: face-reidentification-retail-0095's.
TEMPLATE = np.float32(
    [(0.31557, 0.46157), (0.68262, 0.46157), (0.50026, 0.64051), (0.34947, 0.82469), (0.65344, 0.82469)]
)


def embed(image, landmarks):
    side = network.get_inputs()[0].shape[2]
    everything = 1e9  # no outliers among five points: this is the least-squares similarity
    turn, _ = cv2.estimateAffinePartial2D(np.float32(landmarks), TEMPLATE * side, ransacReprojThreshold=everything)
    aligned = cv2.warpAffine(image, turn, (side, side)).astype(np.float32)  # BGR 0..255; your recogniser may want else
    embedding = network.run(None, {network.get_inputs()[0].name: aligned.transpose(2, 0, 1)[None]})[0].ravel()
    return embedding / np.linalg.norm(embedding)


network = onnxruntime.InferenceSession(sys.argv[2])
subscriber = zmq.Context().socket(zmq.SUB)
subscriber.set(zmq.RCVHWM, 20)  # so that we read on often, however slow we are: who reads nothing for 30 s is let go
subscriber.subscribe("face/")
subscriber.subscribe("system")
subscriber.connect(sys.argv[1])
kind = state = None
while (kind, state) != ("system.status", "ended"):
    parts = subscriber.recv_multipart()
    header = json.loads(parts[1])
    kind, state = header["kind"], header.get("state")
    faces = {image["name"]: image for image in header.get("images", []) if image["for_recognition"]}
    if faces:
        face = faces.get("restored") or faces["crop"]  # with route none the crop goes out alone
        image = cv2.imdecode(np.frombuffer(parts[face["part"]], np.uint8), cv2.IMREAD_COLOR)
        embedding = embed(image, face["landmarks"]).round(5).tolist()
        print(json.dumps([header["camera"], header["track"], face["name"], embedding]), flush=True)
