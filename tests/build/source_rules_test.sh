#!/bin/bash
# source_rules.sh accepts this tree and finds each kind of breach in a tree made for it.
set -u
here=$(cd "$(dirname "$0")" && pwd)
"$here/source_rules.sh" || exit 1

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$tree"/{kernels/base,kernels/cuda,data,parallel,model,launch}
mkdir -p "$tree"/trainer/{config,checkpoint,report,train,tools,cli}
cd "$tree" || exit 1
echo '#include "absl/status/status.h"' > kernels/base/status.h
touch kernels/tensor.h model/spec.h data/sampler.h
for room in config checkpoint report train tools cli; do touch trainer/$room/x.h; done
failed=0
# FILE, its content, and a word of the sentence that must come.
expect() {
  local before after
  before=$(cat "$1" 2>/dev/null)
  printf '%b\n' "$2" > "$1"
  after=$("$here/source_rules.sh" "$tree")
  if [ $? -ne 1 ] || [[ $after != *"$1"*"$3"* ]]; then
    echo "not found: $1 with '$2'; the answer was: $after"
    failed=1
  fi
  if [ -n "$before" ]; then printf '%s\n' "$before" > "$1"; else rm "$1"; fi
}
expect parallel/a.cc '#include "model/spec.h"' 'against the arrows'
expect data/a.cc '#include "kernels/tensor.h"' 'against the arrows'
expect model/a.cc '#include "data/sampler.h"' 'against the arrows'
expect kernels/base/a.cc '#include "kernels/tensor.h"' 'against the arrows'
expect kernels/a.cc '#  include "trainer/config/x.h"' 'against the arrows'
expect trainer/config/a.cc '#include "trainer/report/x.h"' 'against the arrows'
expect trainer/checkpoint/a.cc '#include "trainer/config/x.h"' 'against the arrows'
expect trainer/report/a.cc '#include "trainer/config/x.h"' 'against the arrows'
expect trainer/train/a.cc '#include "trainer/tools/x.h"' 'against the arrows'
expect trainer/tools/a.cc '#include "trainer/cli/x.h"' 'against the arrows'
expect trainer/a.cc '#include "model/spec.h"' 'in no room'
expect model/a.cc '#include "model/none.h"' 'does not exist'
expect trainer/checkpoint/a.cc '#include <hdf5.h>' 'belongs to'
expect trainer/tools/a.cc '#include <yaml-cpp/yaml.h>' 'belongs to'
expect trainer/tools/a.cc '#include <CLI/CLI.hpp>' 'belongs to'
expect trainer/train/a.cc '#include <nlohmann/json.hpp>' 'belongs to'
expect trainer/tools/a.cc '#include <cblas.h>' 'belongs to'
expect kernels/a.cc '#include <cblas.h>' 'belongs to'
expect kernels/a.h '#include <cuda_runtime.h>' 'belongs to'
expect model/hf.cc '#include <nlohmann/json.hpp>' 'belongs to'
expect model/a.cc 'float x = loss.data<float>()[0];' 'on the host'
expect trainer/train/a.cc 'auto* x = t->data<double>();' 'on the host'
expect parallel/a.cc 'Send(t.device_data<float>());' 'on the host'
expect kernels/cuda/a.cu '#include "kernels/base/status.h"' 'plain project headers only'
expect model/a.cc "$(printf 'int x;\\n%.0s' {1..651})" 'has 65'
expect launch/run 'cd /home/somebody/krait' 'path of one machine'
"$here/source_rules.sh" "$tree" > /dev/null || { echo "the clean tree is refused"; failed=1; }
exit $failed
