#include "kernels/check_shape.h"

#include <string>

#include "kernels/base/check.h"

namespace krait {
namespace {

void Append(std::string* text, int64_t extent) {
  if (text->back() != '[') *text += ", ";
  *text += extent < 0 ? "any" : std::to_string(extent);
}

[[noreturn]] void Refuse(const char* op, const Operand& operand, const char* need,
                         std::initializer_list<int64_t> shape) {
  std::string is = "[";
  for (int d = 0; d < operand.tensor.rank(); ++d) Append(&is, operand.tensor.dim(d));
  std::string needed = "[";
  for (const int64_t extent : shape) Append(&needed, extent);
  KRAIT_FATAL(std::string(op) + ": operand " + operand.name + " is " + is + "]" +
              (operand.tensor.contiguous() ? "" : " with gaps") + ", needs " + needed + "]" + need);
}

bool Fits(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.rank() != static_cast<int>(shape.size())) return false;
  int d = 0;
  for (const int64_t extent : shape) {
    if (tensor.dim(d++) != extent && extent >= 0) return false;
  }
  return true;
}

}  // namespace

void CheckShape(const char* op, const Operand& operand, std::initializer_list<int64_t> shape) {
  if (!Fits(operand.tensor, shape)) [[unlikely]]
    Refuse(op, operand, "", shape);
}

void CheckDense(const char* op, const Operand& operand, std::initializer_list<int64_t> shape) {
  if (!Fits(operand.tensor, shape) || !operand.tensor.contiguous()) [[unlikely]] {
    Refuse(op, operand, " without gaps", shape);
  }
}

}  // namespace krait
