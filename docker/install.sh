#!/bin/sh
# What the Dockerfile installs, into the environment whose pip comes first in PATH: sh docker/install.sh cpu|cuda [INDEX]
set -eu
device=${1:?cpu or cuda}
index=${2:-}
case $device in
cpu) extra=onnx ;;
cuda) extra=onnx-gpu ;;
*)
    echo "DEVICE is $device; it must be cpu or cuda" >&2
    exit 2
    ;;
esac
set -- --no-cache-dir --disable-pip-version-check -q
# The versions that pass the tests; of ONNX Runtime's two builds only the one that is installed counts.
pip install "$@" -c constraints.txt ${index:+--index-url "$index"} torch
pip install "$@" -c constraints.txt "setuptools>=77" wheel
pip install "$@" -c constraints.txt --no-build-isolation ".[run,$extra,plot,audit,remote,serve,hub,parquet]" scikit-learn
mekd doctor
