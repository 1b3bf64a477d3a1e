#!/bin/bash
# The rules of the source tree that a compiler does not hold: who may include whom, where
# third-party headers may be used, where tensors are read on the host, file length, no absolute paths
# of somebody's machine.
#
#   tests/build/source_rules.sh [ROOT]     prints each breach as FILE: sentence; exit 1 if any
set -u
cd "${1:-$(dirname "$0")/../..}" || exit 2
breaches=0
breach() { echo "$1: $2"; breaches=$((breaches + 1)); }

folders="kernels data parallel model trainer tests"
mapfile -t sources < <(find $folders -type f \( -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null | sort)
[ "${#sources[@]}" -gt 0 ] || { echo "no sources under $PWD"; exit 2; }

# The headers a file names, one per line, without brackets or quotes.
headers() { sed -nE 's/^[[:space:]]*#[[:space:]]*include[[:space:]]*[<"]([^>"]+)[>"].*/\1/p' "$1"; }

# Arrows: FILE's folder may include project headers that match the pattern.
arrows() {
  case "$1" in
    kernels/base/*) echo '^kernels/base/' ;;
    kernels/*) echo '^kernels/' ;;
    data/*) echo '^(data|kernels/base)/' ;;
    parallel/*) echo '^(parallel|kernels)/' ;;
    model/*) echo '^(model|parallel|kernels)/' ;;
    trainer/config/*) echo '^(trainer/config|model|parallel|data|kernels)/' ;;
    trainer/checkpoint/*) echo '^(trainer/checkpoint|parallel|data|kernels)/' ;;
    trainer/report/*) echo '^(trainer/report|kernels/base)/' ;;
    trainer/train/*) echo '^(trainer/(train|config|checkpoint|report)|model|data|parallel|kernels)/' ;;
    trainer/tools/*) echo '^(trainer/(tools|train|config|checkpoint|report)|model|data|parallel|kernels)/' ;;
    trainer/ablate/*) echo '^(trainer/(ablate|tools|train|config|checkpoint|report)|model|data|parallel|kernels)/' ;;
    trainer/cli/*) echo '^(trainer|model|data|parallel|kernels)/' ;;
    *) echo '.' ;;
  esac
}

# Edges: a pattern of third-party headers, and that of the files that may include them.
edges=(
  '^yaml-cpp/' '^trainer/config/'
  '^hdf5' '^kernels/base/h5(_[a-z]+)?\.(cc|h)$'
  '^(cblas|openblas)' '^kernels/cpu/'
  '^(cuda|cublas|cudnn|nvtx3|cub/|thrust/)' '^kernels/cuda/'
  '^cudnn' '^kernels/cuda/cudnn_attention\.cc$'
  '^nccl' '^parallel/nccl\.cc$'
  '^mpi\.h$' '^parallel/mpi\.cc$'
  '^nlohmann/' '^(kernels/base|data|trainer/(report|tools|ablate|cli))/'
  '^CLI/' '^trainer/cli/'
  '^(zlib|zstd)\.h$' '^data/'
  '^pcre2\.h$' '^data/regex\.cc$'
  '^utf8proc\.h$' '^data/unicode_form\.cc$'
  '^sentencepiece' '^data/sentencepiece\.cc$'
  '^omp\.h$' '^kernels/base/parallel_for\.h$'
  '^(gtest|gmock)/' '^tests/'
)

# What a .cu file includes, directly or through project headers, is the C++ and C libraries, CUDA
# and plain project headers: nvcc chokes on more.
declare -A plain_seen
plain_only() {  # FILE ORIGIN
  local header
  [ -n "${plain_seen[$2 $1]:-}" ] && return
  plain_seen[$2 $1]=1
  for header in $(headers "$1"); do
    if [ -f "$header" ]; then
      plain_only "$header" "$2"
    elif [[ ! $header =~ ^(cuda[a-z0-9_]*\.h|nvtx3/[A-Za-z]+\.h|[a-z_0-9]+|(sys/)?[a-z]+\.h)$ ]]; then
      breach "$2" "includes $header (through $1); a CUDA file includes plain project headers only"
    fi
  done
}

for file in "${sources[@]}"; do
  [[ $file =~ ^trainer/[^/]+$ ]] && breach "$file" "lies in no room of trainer/"
  allowed=$(arrows "$file")
  for header in $(headers "$file"); do
    if [[ $header =~ ^(kernels|data|parallel|model|trainer)/ ]]; then
      [[ $header =~ $allowed ]] || breach "$file" "includes $header against the arrows"
      [ -f "$header" ] || [[ $file == tests/* && -f tests/$header ]] ||
        breach "$file" "includes $header, which does not exist"
      continue
    fi
    [[ $file == tests/* ]] && continue
    for ((i = 0; i < ${#edges[@]}; i += 2)); do
      [[ $header =~ ${edges[i]} && ! $file =~ ${edges[i + 1]} ]] &&
        breach "$file" "includes $header, which belongs to ${edges[i + 1]}"
    done
  done
  # A tensor may be in device memory: outside the ops it is read and written by kernels/transfer.h.
  if [[ $file != kernels/* && $file != tests/* ]]; then
    while IFS=: read -r line text; do
      breach "$file:$line" "reads a tensor on the host: $text"
    done < <(grep -nE '[.>](device_)?data<' "$file")
  fi
  case "$file" in *.cu | *.cuh) plain_only "$file" "$file" ;; esac
  lines=$(wc -l < "$file")
  [ "$lines" -le 650 ] || breach "$file" "has $lines lines; 600 is the aim, 650 the end"
done

# Absolute paths that exist only on somebody's machine.
while IFS=: read -r file line text; do
  breach "$file:$line" "names a path of one machine: $text"
done < <(grep -rnoE '(^|[^A-Za-z0-9_.$}*)>/-])/(home|root|work|mnt|opt|scratch|Users)/[A-Za-z0-9_.]+' \
  $folders configs launch cmake .ci README.md CMakeLists.txt CMakePresets.json 2>/dev/null |
  grep -v '^tests/build/')

if [ "$breaches" -gt 0 ]; then
  echo "$breaches breaches in ${#sources[@]} files"
  exit 1
fi
echo "${#sources[@]} files keep the rules"
