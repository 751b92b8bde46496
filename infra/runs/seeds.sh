# Sourced by the studies that repeat each run with several seeds. Reads $seeds and $ranks.

each_seed() {  # each_seed COMMAND...: COMMAND... SEED for every seed; side by side, a core each, where a run has one rank
  local seed process processes=()
  for seed in $seeds; do
    if [ "$ranks" -eq 1 ]; then
      OMP_NUM_THREADS=1 "$@" "$seed" &
      processes+=($!)
    else
      "$@" "$seed"
    fi
  done
  for process in "${processes[@]}"; do wait "$process"; done
}
