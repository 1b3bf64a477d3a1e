// krait config, krait config keys
#include <algorithm>

#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "trainer/cli/commands.h"

namespace krait {
namespace {

std::string KeysJson(const std::vector<ConfigKeyInfo>& keys) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const ConfigKeyInfo& key : keys) {
    list.push_back({{"key", key.key},
                    {"type", key.type},
                    {"default", key.default_value},
                    {"unit", key.unit},
                    {"meaning", key.meaning}});
  }
  return list.dump(2) + "\n";
}

std::string KeysText(const std::vector<ConfigKeyInfo>& keys) {
  size_t key_width = 0;
  size_t type_width = 0;
  size_t default_width = 0;
  for (const ConfigKeyInfo& key : keys) {
    key_width = std::max(key_width, key.key.size());
    type_width = std::max(type_width, key.type.size());
    default_width = std::max(default_width, key.default_value.size());
  }
  std::string text;
  for (const ConfigKeyInfo& key : keys) {
    text += absl::StrFormat("%-*s  %-*s  %-*s  %s%s\n", key_width, key.key, type_width, key.type,
                            default_width, key.default_value, key.meaning,
                            key.unit.empty() ? "" : " [" + key.unit + "]");
  }
  return text;
}

absl::StatusOr<ExitCode> PrintKeys(const std::string& prefix, bool json) {
  std::vector<ConfigKeyInfo> keys = ListConfigKeys();
  std::erase_if(keys, [&](const ConfigKeyInfo& key) { return !key.key.starts_with(prefix); });
  if (keys.empty()) {
    return Error(ExitCode::kConfig,
                 "no key begins with \"" + prefix + "\"; krait config keys lists all");
  }
  KRAIT_RETURN_IF_ERROR(Print(json ? KeysJson(keys) : KeysText(keys)));
  return ExitCode::kOk;
}

}  // namespace

void AddConfigCommands(CLI::App* app, CommandLine* line) {
  struct Arguments {
    ConfigArguments config;
    std::string prefix;
    bool json = false;
  };
  auto arguments = std::make_shared<Arguments>();
  CLI::App* config =
      app->add_subcommand("config", "The resolved config as YAML, with where each value came from.")
          ->require_subcommand(0, 1);
  AddPath(config, "config", &arguments->config.path, "the run's YAML file", "CONFIG.yaml");
  AddOverrides(config, &arguments->config.overrides);
  CLI::App* keys =
      config->add_subcommand("keys", "Every key with its type, default, meaning and [unit].");
  keys->add_option("prefix", arguments->prefix, "only keys that begin with it")
      ->type_name("PREFIX");
  keys->add_flag("--json", arguments->json, "JSON instead of text");

  config->callback([line, arguments, keys] {
    if (keys->parsed()) {
      line->run = [arguments] { return PrintKeys(arguments->prefix, arguments->json); };
    } else if (!arguments->config.path.empty()) {
      line->run = [arguments]() -> absl::StatusOr<ExitCode> {
        std::string text;
        KRAIT_ASSIGN_OR_RETURN(
            text, ExplainConfig(arguments->config.path, arguments->config.overrides, /*ranks=*/0));
        KRAIT_RETURN_IF_ERROR(Print(text));
        return ExitCode::kOk;
      };
    }
  });
}

}  // namespace krait
