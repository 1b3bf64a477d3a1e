#include "parallel/groups.h"

namespace krait {

Groups MakeOneRankGroups() {
  return {Mesh(), MakeOneRankCommunicator(), MakeOneRankCommunicator()};
}

}  // namespace krait
