#!/usr/bin/env bash
# Make an environment for batchproc on a file system that all nodes see:  cluster/environment.sh FOLDER [PYTHON]
# Then, in a site profile:  python = "FOLDER/bin/python"
set -euo pipefail
folder=${1:?which folder?}
python=${2:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$python" -m venv "$folder"
folder=$(cd "$folder" && pwd)  # jobs begin elsewhere
"$folder/bin/python" -m pip install --quiet "$here[hpc]"
# Compile now what is compiled on first use (Numba), once, not in a thousand jobs at the same time.
demo=$(mktemp -d)
trap 'rm -rf "$demo"' EXIT
"$folder/bin/batchproc" demo --out "$demo/demo" --cluster serial --quiet
echo "python = \"$folder/bin/python\""
