#!/usr/bin/env bash
# Pin requirements/*.in into *.txt with uv (`pip install uv`). Needs the index only, no packages are built or kept.
set -euo pipefail
cd "$(dirname "$0")"
pin() { uv pip compile --python-version 3.11 --no-header --annotation-style line -q --upgrade "$@"; }
pin --override excluded.txt --override excluded-cpu.txt cpu.in -o cpu.txt
pin --override excluded.txt --override excluded-cpu.txt -c cpu.txt dev.in -o dev.txt
pin --override excluded-gpu.txt gpu.in -o gpu.txt
pin -c cpu.txt conda.in -o conda.txt
pin -c cpu.txt ray.in -o ray.txt
pin -c cpu.txt -c ray.txt kuberay.in -o kuberay.txt
pin --override excluded-harness.txt -c cpu.txt harness.in -o harness.txt
pin docs.in -o docs.txt
