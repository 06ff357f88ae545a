#!/usr/bin/env bash
# Environment, style and tests, as CI runs them:  bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" requirements{,-serve,-dev}.txt

# The tests of the page look at it in a real browser. CI gets one here; on your machine they are
# skipped where there is none, and name the command that installs it.
if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null &&
    ! { command -v chromium && command -v chromedriver; } >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || true # an index that is there may do
    apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null ||
        echo "Chromium can't be installed: the tests that need it will fail" >&2
fi

# The tests' models are small: more threads only wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

.venv/bin/ruff check .
.venv/bin/ruff format --check .
# A process a core, up to 8, takes one file after another. Plain `pytest` runs in one.
exec .venv/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
