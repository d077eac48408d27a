#!/usr/bin/env bash
# Make a virtual environment with the first Python that can: make_venv.sh DIRECTORY. PYTHON=... chooses one.
set -euo pipefail

directory=$1
# pyspark, TensorFlow and Keras meet on these versions.
usable='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

if [ -x "$directory/bin/python" ] && "$directory/bin/python" -m pip --version > /dev/null 2>&1; then
  exit 0
fi

without_venv=""
for python in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
  # A name may be there and not run: pyenv's shims answer for versions that are not installed.
  "$python" -c "$usable" > /dev/null 2>&1 || continue
  if "$python" -c 'import ensurepip, venv' > /dev/null 2>&1; then
    rm -rf "$directory"
    exec "$python" -m venv "$directory"
  fi
  without_venv=$python
done

if [ -n "$without_venv" ]; then
  echo "$without_venv cannot make virtual environments: install its venv module" \
    "(Debian: apt-get install python3-venv), then run make again." >&2
else
  echo "No Python 3.11, 3.12 or 3.13 found: install one (Debian 12: apt-get install python3 python3-venv)," \
    "or say where it is: make setup PYTHON=/path/to/python3." >&2
fi
exit 1
