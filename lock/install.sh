#!/usr/bin/env bash
# Makes VENV from a lock: `lock/install.sh .venv lock/requirements.lock`. Called by `make install`.
#
# `.installed` inside the environment names the checkout and the lock it was made for, and is written last. Without it
# the environment is half made, or was made for another folder, and is made again from nothing.
set -euo pipefail

venv=$1 lock=$2 stamp=$1/.installed mark="$PWD $2"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3 python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  echo "Outback needs Python 3.11, found none: install it and put python3.11 on PATH, or run \`make PYTHON=/path/to/python3.11\`." >&2
  return 1
}

make_venv() {
  local python=$1
  rm -rf "$venv"
  if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    "$python" -m venv "$venv"
  elif "$python" -m pip --version >/dev/null 2>&1; then  # some distributions ship pip but not ensurepip
    "$python" -m venv --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install -qq pip
  elif command -v uv >/dev/null; then
    uv venv --quiet --seed --python "$python" "$venv"
  else
    echo "$python has neither ensurepip nor pip: on Debian and Ubuntu run \`apt-get install python3.11-venv\`, then make again." >&2
    return 1
  fi
}

if [ "$(cat "$stamp" 2>/dev/null)" != "$mark" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
  make_venv "$(find_python)"
fi
rm -f "$stamp"

# Company networks sign traffic with a certificate that only the system knows.
export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-true}

python=$venv/bin/python
echo "installing $lock into $venv" >&2
# uv takes half a minute where pip takes several. pip follows indexes that only pip.conf knows, so it is the way out.
if ! { "$python" -m pip install -qq --require-hashes -r lock/installer.lock \
  && VIRTUAL_ENV="$PWD/$venv" "$venv/bin/uv" pip sync --quiet --require-hashes "$lock"; }; then
  echo "uv could not install the lock; trying pip, which takes minutes" >&2
  "$python" -m pip install -qq --no-compile --no-deps --require-hashes -r "$lock"
fi
"$python" -m pip install -qq --no-deps --no-build-isolation --no-index -e .

# Compiling everything takes minutes; these are what every command imports first. The rest is cached as it is imported.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for package in click pyarrow pydantic pyiceberg rich sqlalchemy typer; do
  "$python" -m compileall -q -j 0 "$site/$package" >/dev/null || true  # some packages carry templates that are no Python
done
echo "$mark" > "$stamp"
