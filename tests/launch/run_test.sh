#!/bin/bash
# launch/run with a command that stands in for krait, under the mpirun of this machine.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
export OMP_WAIT_POLICY=passive
unset OMP_NUM_THREADS
folder=$(mktemp -d "${TMPDIR:-/tmp}/krait run XXXXXX")
trap 'rm -rf "$folder"' EXIT
cd "$folder" || exit 1
failures=0
fail() {
  echo "FAILED: $1"
  echo "  exit code $code; output: $(cat out); errors: $(cat err)"
  failures=$((failures + 1))
}
code_is() { [ "$code" -eq "$1" ] || fail "$2: exit code $code, not $1"; }
says() { grep -qF -- "$2" "$1" || fail "nothing like '$2' in $1"; }
run() {
  "$root/launch/run" "$@" > out 2> err
  code=$?
}
# Until all of the ranks have said that they are there.
await_ranks() {
  for ((i = 0; i < 400; i++)); do
    [ "$(cat pids 2> /dev/null | wc -l)" -lt "$1" ] || return
    sleep 0.05
  done
  fail "the ranks did not start"
}
# Within ten seconds no rank is left.
no_rank_left() {
  local pid
  for ((i = 0; i < 200; i++)); do
    local left=''
    while read -r pid; do ! kill -0 "$pid" 2> /dev/null || left=$pid; done < pids
    [ -n "$left" ] || return
    sleep 0.05
  done
  fail "a rank is left"
}

mkdir 'the build'
cat > 'the build/krait' << 'END'
#!/bin/bash
# Says how it was called; then does what the word after the config says.
if [ "$OMPI_COMM_WORLD_RANK" = 0 ]; then
  printf '<%s>' "$@"
  printf '\nthreads %s, shared %s\n' "$OMP_NUM_THREADS" "${NCCL_MULTI_RANK_GPU_ENABLE:-no}"
fi
asked=''
trap 'asked=yes' USR1
echo $$ >> pids
case "${3:-}" in
  code=*) exit "${3#code=}" ;;
  wait | deaf)
    for ((i = 0; i < 600; i++)); do
      sleep 0.05 2> /dev/null
      [ "$3" = deaf ] || [ -z "$asked" ] || exit 10
    done ;;
esac
END
chmod +x 'the build/krait'
krait=(--krait 'the build/krait')

# What reaches the command, and what is printed.
run -n 3 "${krait[@]}" 'my config.yaml' "a.b=it's" 'x=$HOME *' ''
code_is 0 "a run that ends well"
says out "<train><my config.yaml><a.b=it's><x=\$HOME *><>"
says err "$ mpirun -n 3"
says err "/the build/krait' train 'my config.yaml'"
# The line is what was run: it does the same again.
sed -n 's/^\$ //p' err > line
printf 'localhost slots=4\n' > hosts
bash line > again 2> err
code=$?
cmp -s out again || fail "the printed line does something else: $(cat line)"
OMP_NUM_THREADS=5 run -n 2 --hostfile hosts "${krait[@]}" config.yaml
code_is 0 "a hostfile"
says out "threads 5"
says err "--hostfile hosts"

# Exit codes.
run -n 2 "${krait[@]}" config.yaml code=31
code_is 31 "the ranks' code"
rm -f pids
"$root/launch/run" -n 3 "${krait[@]}" config.yaml wait > out 2> err &
await_ranks 3
kill -KILL "$(sed -n 2p pids)"
wait $!
code=$?
code_is 137 "a rank that was killed"
no_rank_left

# Requests to stop.
for signal in TERM INT HUP USR1; do
  rm -f pids
  env --default-signal=INT,HUP "$root/launch/run" -n 3 "${krait[@]}" config.yaml wait > out 2> err &
  await_ranks 3
  kill -$signal $!
  wait $!
  code=$?
  code_is 10 "SIG$signal"
  says err "all ranks are asked to save and stop"
  no_rank_left
done
rm -f pids
env --default-signal=INT "$root/launch/run" -n 3 "${krait[@]}" config.yaml deaf > out 2> err &
await_ranks 3
for ((n = 0; n < 6; n++)); do
  kill -INT $! 2> /dev/null
  sleep 0.2
done
wait $!
code=$?
[ $code -ne 0 ] && [ $code -ne 10 ] || fail "a second Ctrl-C"
no_rank_left
rm -f pids
"$root/launch/run" -n 3 "${krait[@]}" config.yaml wait > out 2> err &
await_ranks 3
{ kill -KILL $! && wait $!; } 2> /dev/null
no_rank_left

# Misuse: one sentence, and 20.
misuse() {  # SENTENCE WORDS...
  local sentence=$1
  shift
  run "$@"
  code_is 20 "$*"
  says err "$sentence"
  [ "$(wc -l < err)" -eq 1 ] || fail "more than one line"
}
misuse "a CONFIG is missing"
misuse "a CONFIG is missing" -n 2
misuse "-n is missing" config.yaml
misuse "-n 0: a number of ranks" -n 0 config.yaml
misuse "-n two: a number of ranks" -n two config.yaml
misuse "-n needs a value" -n
misuse "unknown option --gpus" -n 2 --gpus 2 config.yaml
misuse "--hostfile none cannot be read" -n 2 --hostfile none config.yaml
misuse "there is no command none/krait" -n 2 --krait none/krait config.yaml
misuse "--share-gpus: $folder/the build/krait has no NCCL" -n 2 --share-gpus "${krait[@]}" config.yaml
mkdir other
printf '#!/bin/sh\necho "HYDRA build details:"\n' > other/mpirun
chmod +x other/mpirun
PATH="$folder/other:$PATH" misuse "is not Open MPI's" -n 2 "${krait[@]}" config.yaml
for version in 2.28.9 2.30.3; do
  sed "s/^asked=''/# NCCL version $version+cuda13.0\n&/" 'the build/krait' > "krait-$version"
  chmod +x "krait-$version"
done
misuse "--share-gpus needs NCCL 2.30.3 or newer, and $folder/krait-2.28.9 uses 2.28.9" \
  -n 2 --share-gpus --krait krait-2.28.9 config.yaml
run -n 2 --share-gpus --krait krait-2.30.3 config.yaml
code_is 0 "--share-gpus"
says out "shared 1"
says err "-x NCCL_MAX_CTAS=4"
run --help
code_is 0 --help
says out "launch/run -n N"

# launch/slurm.sbatch, with commands that stand in for Slurm's.
ln -s "$root/launch" launch
mkdir -p build/cpu bin
cp 'the build/krait' build/cpu/krait
printf '#!/bin/sh\necho "$@" >> "%s/requeued"\n' "$folder" > bin/scontrol
chmod +x bin/scontrol
slurm() {  # WORDS...; in the background
  rm -f pids requeued
  env PATH="$folder/bin:$PATH" SLURM_JOB_ID=77 SLURM_SUBMIT_DIR="$folder" SLURM_JOB_NUM_NODES=1 \
    SLURM_NTASKS_PER_NODE=2 OMPI_MCA_ras=^slurm OMPI_MCA_plm=^slurm SECONDS="$seconds" \
    OMPI_MCA_rmaps_base_oversubscribe=1 bash launch/slurm.sbatch config.yaml "$@" > out 2> err &
}
ends() {  # CODE REQUEUED
  wait $!
  code=$?
  code_is "$1" "launch/slurm.sbatch"
  [ "$(cat requeued 2> /dev/null)" = "$2" ] || fail "requeued: '$(cat requeued 2> /dev/null)'"
}
seconds=0
slurm wait
await_ranks 2
kill -USR1 $!
ends 10 "requeue 77"
slurm wait
await_ranks 2
kill -USR1 "$(sed -n 1p pids)"  # the run ends by itself
ends 10 ""
slurm code=20
ends 20 ""
slurm code=50
ends 50 ""
seconds=700
slurm code=50
ends 50 "requeue 77"
slurm wait
await_ranks 2
kill -KILL "$(sed -n 1p pids)"
ends 137 "requeue 77"

[ $failures -eq 0 ] && echo "launch/run does what it says"
exit $((failures > 0))
