# Sourced by quickstart.sh and test.sh: the environment in .venv, made once and again when
# requirements.txt changes. Leaves the repository's root as the working directory.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if [ ! -x .venv/bin/python ]; then
    python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
    if ! "${python:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "Python 3.11 or newer is needed, found: ${python:-none}." \
            "Name one: PYTHON=/path/to/python3.11 bash $0" >&2
        exit 1
    fi
    echo "Making .venv with $python"
    "$python" -m venv .venv || exit 1
fi
# The copy is written after a complete installation only, so an interrupted one is done again.
if ! cmp -s requirements.txt .venv/requirements.installed; then
    echo "Installing requirements.txt into .venv"
    .venv/bin/python -m pip install --quiet --requirement requirements.txt || exit 1
    cp requirements.txt .venv/requirements.installed
fi

# Threads that wait by spinning take the cores from those that compute when a machine is shared.
export OMP_WAIT_POLICY=passive
# The tokenizer's own threads gain nothing on short texts and clash with the loader's workers.
export TOKENIZERS_PARALLELISM=false
