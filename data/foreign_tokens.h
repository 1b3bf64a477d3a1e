// Token files of other programs, read as they are (little-endian):
//
//   Megatron-LM   X.idx beside X.bin: 9 bytes "MMIDIDX\0\0", u64 version 1, u8 type of the ids, u64
//                 sequences, u64 documents + 1, i32 length of each sequence, i64 its byte in X.bin,
//                 i64 for each document its first sequence, then the number of sequences
//                 (megatron/core/datasets/indexed_dataset.py)
//   llm.c         X.bin: 256 i32, of which the first three are 20240520, 1 (GPT-2, u16) or
//   20240801,
//                 7 (Llama 3, u32), and the number of ids; then the ids. A document begins with
//                 50256 or 128000 (dev/data/data_common.py)
#ifndef KRAIT_DATA_FOREIGN_TOKENS_H_
#define KRAIT_DATA_FOREIGN_TOKENS_H_

#include <cstdint>
#include <string>

#include "data/document_table.h"
#include "kernels/base/dtype.h"
#include "kernels/base/file.h"
#include "kernels/base/status.h"

namespace krait {

struct ForeignTokens {
  std::string format;  // "Megatron", "llm.c"
  File ids;
  int64_t begin = 0;  // byte of the first id
  DType dtype = DType::kU16;
  int64_t tokens = 0;
  int64_t vocab_size = 0;   // the largest id + 1; 0: not known
  DocumentTable documents;  // those without ids are left out
  // Of the whole content of llm.c's; of Megatron's of the index and of the first and last MiB of
  // ids.
  std::string content_hash;
};

// By its name, .idx or .bin.
bool IsForeignTokenFile(const std::string& path);
// kData with path and place for what is not whole or not of these formats. An index is read in
// pieces, and again where its documents are asked for. llm.c's files are read whole. The table of
// documents stays in memory for llm.c's, which have at most 2^31 ids, and for an index that has
// documents without ids.
absl::StatusOr<ForeignTokens> OpenForeignTokens(const std::string& path);

}  // namespace krait

#endif  // KRAIT_DATA_FOREIGN_TOKENS_H_
