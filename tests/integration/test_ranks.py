"""Processes that share an evaluation exchange what they found."""

import json
import os
import socket
import subprocess
import sys

PROGRAM = """
import json, torch
from sirius.evaluation.ranks import Ranks
ranks = Ranks.here()
tensors = ranks.gather_tensor(torch.tensor(10 + ranks.rank)).tolist()
objects = ranks.gather({"rank": ranks.rank})
ranks.wait()
print(json.dumps([tensors, objects]))
"""


def test_two_processes_gather_tensors_and_objects():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, **names, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (json.loads(each.communicate(timeout=120)[0]) for each in both)
    assert first == [[10, 11], [{"rank": 0}, {"rank": 1}]]
    assert second == [[10, 11], None]
