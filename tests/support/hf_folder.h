// Hugging Face folders for tests: copies that are edited, and weight files with any dtype in them.
#ifndef KRAIT_TESTS_SUPPORT_HF_FOLDER_H_
#define KRAIT_TESTS_SUPPORT_HF_FOLDER_H_

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/base/check.h"

namespace krait::testing {

inline std::string ReadBytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  KRAIT_CHECK(in.good());
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void WriteBytes(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary);
  out << bytes;
  out.close();
  KRAIT_CHECK(out.good());
}

// A tensor as it lies in a file.
struct RawTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};
using RawTensors = std::map<std::string, RawTensor>;

inline RawTensor RawFloats(const std::vector<int64_t>& shape, const std::vector<float>& values) {
  return {"F32", shape, {reinterpret_cast<const char*>(values.data()), 4 * values.size()}};
}

inline RawTensors ReadRaw(const std::string& path) {
  const std::string file = ReadBytes(path);
  uint64_t length = 0;
  std::memcpy(&length, file.data(), 8);
  RawTensors tensors;
  const auto header = nlohmann::json::parse(file.substr(8, length));
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    const uint64_t begin = entry["data_offsets"][0], end = entry["data_offsets"][1];
    tensors[name] = {entry["dtype"], entry["shape"], file.substr(8 + length + begin, end - begin)};
  }
  return tensors;
}

inline void WriteRaw(const std::string& path, const RawTensors& tensors) {
  nlohmann::json header = nlohmann::json::object();
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", tensor.dtype},
                    {"shape", tensor.shape},
                    {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
    data += tensor.bytes;
  }
  const std::string text = header.dump();
  const uint64_t length = text.size();
  WriteBytes(path, std::string(reinterpret_cast<const char*>(&length), 8) + text + data);
}

inline nlohmann::json ReadJson(const std::string& path) {
  return nlohmann::json::parse(ReadBytes(path));
}

inline void EditJson(const std::string& path, const std::function<void(nlohmann::json*)>& edit) {
  nlohmann::json json = ReadJson(path);
  edit(&json);
  WriteBytes(path, json.dump(1));
}

// In place: the tensors of FOLDER/model.safetensors.
inline void EditTensors(const std::string& folder, const std::function<void(RawTensors*)>& edit) {
  RawTensors tensors = ReadRaw(folder + "/model.safetensors");
  edit(&tensors);
  WriteRaw(folder + "/model.safetensors", tensors);
}

// Every tensor under another name.
inline void RenameTensors(const std::string& folder,
                          const std::function<std::string(const std::string&)>& name) {
  EditTensors(folder, [&](RawTensors* tensors) {
    RawTensors renamed;
    for (auto& [old, tensor] : *tensors) renamed[name(old)] = std::move(tensor);
    *tensors = std::move(renamed);
  });
}

}  // namespace krait::testing

#endif  // KRAIT_TESTS_SUPPORT_HF_FOLDER_H_
