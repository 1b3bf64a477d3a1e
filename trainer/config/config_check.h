// Rules over several keys of a config. Internal to the config reader.
#ifndef KRAIT_TRAINER_CONFIG_CONFIG_CHECK_H_
#define KRAIT_TRAINER_CONFIG_CONFIG_CHECK_H_

#include "trainer/config/config.h"
#include "trainer/config/config_keys.h"
#include "trainer/config/config_reader.h"

namespace krait {

// Reports every broken rule over keys that are good by themselves. `config` is complete.
void CheckModel(const ModelSpec& model, ConfigReader* reader);
void CheckRun(const RunConfig& config, ConfigUse use, int64_t ranks, ConfigReader* reader);

}  // namespace krait

#endif  // KRAIT_TRAINER_CONFIG_CONFIG_CHECK_H_
