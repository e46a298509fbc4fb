"""A ClientApp that fails as ``faults.py`` beside it says: {"PARTITION ROUND": FAULT}.

It takes the place of the app's own door, which lies beside it as ``honest_client_app.py``.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from faults import FAULTS
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from honest_client_app import app as honest

app = ClientApp()


@app.query()
def who(message: Message, context: Context) -> Message:
    return honest(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return honest(message, context)


@app.evaluate("final")
def evaluate_final(message: Message, context: Context) -> Message:
    return honest(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    asked: Any = message.content.config_records["config"]
    fault = FAULTS.get(f"{context.node_config['partition-id']} {asked['round']}", "")
    if fault == "raises":
        raise ValueError("out of paper")
    if fault == "exits":
        os._exit(7)
    while fault.startswith("wait ") and not Path(fault[5:]).exists():
        time.sleep(0.1)
    reply = honest(message, context)
    arrays = {name: array.numpy().copy() for name, array in reply.content["arrays"].items()}
    name = next(iter(arrays))
    if fault == "nan":
        arrays[name][...] = np.nan
    elif fault == "infinite":
        arrays[name].flat[0] = np.inf
    elif fault == "huge":
        arrays = {n: a * np.float32(1e9) for n, a in arrays.items()}
    elif fault == "shape":
        arrays[name] = arrays[name][:1].copy()
    elif fault == "dtype":
        arrays[name] = arrays[name].astype(np.float64)
    elif fault == "names":
        arrays["mine"] = arrays.pop(name)
    elif fault == "empty":
        arrays = {}
    elif fault == "large":
        arrays[name] = np.zeros(2**26, np.float32)  # 256 MiB
    elif fault == "replayed":
        reply.content["metrics"]["round"] -= 1
    elif fault.startswith("touch "):  # tells the test that it is training, and waits
        Path(fault[6:]).touch()
        time.sleep(10_000)
    reply.content["arrays"] = ArrayRecord({n: Array(a) for n, a in arrays.items()})
    return reply
