#!/usr/bin/env bash
# Test launch/ on a real Slurm cluster that lives and dies inside one set of namespaces of this machine.
#
#   tests/slurm/run.sh [pytest options]    -k chooses among the tests
#   SKIP_SLURM=1 tests/slurm/run.sh        say that nothing was tested, and succeed
#
# Needs root (namespaces) and Debian's packages below, which it installs where they are missing. Everything the tests
# start runs in one process namespace whose end ends it all, on a network that has no way out of the machine, with its
# files on a tmpfs that goes with it: nothing is left behind, however the tests end.
set -euo pipefail

if [[ ${SKIP_SLURM:-} == 1 ]]; then
  echo "Slurm tests skipped: SKIP_SLURM=1"
  exit 0
fi

fail() {
  echo "Slurm tests cannot run here: $1. SKIP_SLURM=1 leaves them out." >&2
  exit 1
}

cd "$(dirname "$0")/../.."
python=${PYTHON:-$PWD/.venv/bin/python}
[[ -x $python ]] || fail "$python is missing (make setup)"
[[ $(id -u) == 0 ]] || fail "it needs root to make namespaces"

export PATH=$PATH:/usr/sbin:/sbin
missing=()
for pair in slurmctld:slurmctld slurmd:slurmd srun:slurm-client munged:munge ip:iproute2; do
  command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
if ((${#missing[@]})); then
  command -v apt-get >/dev/null || fail "${missing[*]} are missing and there is no apt-get"
  echo "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -qq -y --no-install-recommends "${missing[@]}"; } >/dev/null ||
    fail "apt-get could not install ${missing[*]}"
fi

unshare --mount --uts --pid --net --fork --kill-child --mount-proc true 2>/dev/null || fail "it may not make namespaces"
# shellcheck disable=SC2016
exec unshare --mount --uts --pid --net --fork --kill-child --mount-proc bash -c '
  mount -t tmpfs -o mode=755 tmpfs /mnt
  hostname control
  ip link set lo up
  "$@"
  exit $?' control env MEGAQAD_SLURM_FOLDER=/mnt "$python" -m pytest -q tests/slurm "$@"
