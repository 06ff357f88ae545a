# Sourced with the requirements that a script needs:  source scripts/env.sh requirements.txt
# Makes .venv once, and installs again what has changed. Leaves the repository's root as the
# working directory.
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
for file in "$@"; do
    # The copy is written after a complete installation only, so an interrupted one is done again.
    if ! cat constraints.txt "$file" | cmp -s - ".venv/$file.installed"; then
        echo "Installing $file into .venv"
        .venv/bin/python -m pip install --quiet -r "$file" -c constraints.txt || exit 1
        cat constraints.txt "$file" >".venv/$file.installed"
    fi
done

# Threads that wait by spinning take the cores from those that compute when a machine is shared.
export OMP_WAIT_POLICY=passive
# The tokenizer's own threads gain nothing on short texts and clash with the loader's workers.
export TOKENIZERS_PARALLELISM=false
