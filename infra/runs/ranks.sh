# Sourced by scripts that train on two CPU ranks of this machine and end them as they like; $python runs Python.
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PYTHONPATH=$PWD
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1} # a quarter of a step's time at depth 15
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT

start_ranks() { # ARGUMENTS of `trainer train`: in the background, their ids in $pids
  local port rank
  port=$("$python" -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
  pids=()
  for rank in 0 1; do
    RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=2 LOCAL_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
      "$python" -m trainer train "$@" --parallel.zero-stage 3 --parallel.persistence-threshold 0 --parallel.max-live 0 &
    pids+=($!)
  done
}

ended() { # the exit codes of both ranks, in $codes
  codes=()
  for pid in "${pids[@]}"; do
    local code=0
    wait "$pid" || code=$?
    codes+=("$code")
  done
  pids=()
}

write_data() { # FOLDER: latents of 16x32x32 (256 tokens) and 154 text tokens in SD3's shapes and layout; made up
  [ -e "$1/dataset.json" ] || "$python" - "$1" <<'PY'
import sys

from data_pipeline.plans import SD3_TEXT
from data_pipeline.packing.synthetic import write_synthetic

shape = (16, 32, 32)
write_synthetic(sys.argv[1], num_samples=64, val_samples=8, latent_shape=shape, text_spec=SD3_TEXT, buckets=("256x256",))
PY
}
