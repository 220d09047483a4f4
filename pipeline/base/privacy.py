"""lowpass sends nothing anywhere, and neither do the libraries that it uses."""

import os
import sys
from types import ModuleType
from typing import cast

# Read by the libraries when they are first used. The first two are ONNX Runtime's names for it, of 1.32 and before:
# on Linux it otherwise writes a device identifier and a data base into the home folder, and posts from a thread.
SWITCHES = {"ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def send_nothing() -> None:
    """For this process and those that it starts; who sets one of `SWITCHES` has it his way.

    OpenVINO (2026.4) opts in to telemetry when it is imported: it writes into the home folder and forks the process
    from a thread to post to an analytics server, which has frozen a process whose other threads held locks. Where
    `openvino_telemetry` cannot be imported, it uses a stub of its own.
    """
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    sys.modules.setdefault("openvino_telemetry", cast(ModuleType, None))  # importing it fails from now on
