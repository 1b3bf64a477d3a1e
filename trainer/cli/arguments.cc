// Options that several commands have, and what they print.
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "kernels/base/number.h"
#include "kernels/base/shell.h"
#include "trainer/cli/commands.h"

namespace krait {
namespace {

// A number that `parse` reads from the option's text, and `*value` takes when it is at least 0.
template <typename T, typename Parse>
CLI::Option* AddParsed(CLI::App* app, const std::string& name, T* value, const std::string& help,
                       const Parse& parse) {
  return app->add_option_function<std::string>(
      name,
      [name, value, parse](const std::string& text) {
        std::string why;
        const auto number = parse(text, &why);
        if (!number.has_value()) throw CLI::ValidationError(name, text + " " + why);
        if (*number < 0) throw CLI::ValidationError(name, text + " is negative");
        *value = static_cast<T>(*number);
      },
      help);
}

}  // namespace

void AddOverrides(CLI::App* app, std::vector<std::string>* overrides) {
  app->add_option("overrides", *overrides, "key.path=value words that replace settings")
      ->type_name("KEY=VALUE");
}

void AddConfigArguments(CLI::App* app, ConfigArguments* arguments) {
  AddPath(app, "config", &arguments->path, "the run's YAML file", "CONFIG.yaml")->required();
  AddOverrides(app, &arguments->overrides);
}

absl::StatusOr<RunConfig> LoadNamedConfig(const ConfigArguments& arguments, ConfigUse use,
                                          int64_t ranks) {
  auto config = LoadConfig(arguments.path, arguments.overrides, use, ranks);
  if (config.ok()) {
    for (const std::string& note : config->notes) PrintNotice("note: " + note);
  }
  return config;
}

absl::StatusOr<RunConfig> LoadNamedConfig(const ConfigArguments& arguments, ConfigUse use,
                                          World* world) {
  auto config = LoadConfig(arguments.path, arguments.overrides, use, world->size());
  KRAIT_RETURN_IF_ERROR(Agree(world, config.status()));
  for (const std::string& note : config->notes) {
    if (world->first()) PrintNotice("note: " + note);
  }
  return config;
}

void AddCount(CLI::App* app, const std::string& name, int64_t* value, const std::string& help) {
  AddParsed(app, name, value, help, [](const std::string& text, std::string* why) {
    return ParseInteger(text, why);
  })->type_name("N");
}

void AddSeed(CLI::App* app, uint64_t* seed, const std::string& help) {
  AddParsed(app, "--seed", seed, help + " (default " + std::to_string(*seed) + ")",
            [](const std::string& text, std::string* why) { return ParseInteger(text, why); })
      ->type_name("N");
}

void AddNumber(CLI::App* app, const std::string& name, double* value, const std::string& help) {
  AddParsed(app, name, value, help + " (default " + PrintNumber(*value) + ")",
            [](const std::string& text, std::string* why) { return ParseNumber(text, why); })
      ->type_name("X");
}

CLI::Option* AddPath(CLI::App* app, const std::string& name, std::string* path,
                     const std::string& help, const std::string& type) {
  return app
      ->add_option_function<std::string>(
          name, [path](const std::string& text) { *path = UserPath(text); }, help)
      ->type_name(type);
}

CLI::Option* AddPaths(CLI::App* app, const std::string& name, std::vector<std::string>* paths,
                      const std::string& help, const std::string& type) {
  return app
      ->add_option_function<std::vector<std::string>>(
          name,
          [paths](const std::vector<std::string>& words) {
            for (const std::string& word : words) paths->push_back(UserPath(word));
          },
          help)
      ->type_name(type);
}

void AddForce(CLI::App* app, bool* force) {
  app->add_flag("--force", *force, "replace what is there already, if it is of the same kind");
}

absl::Status Print(std::string_view text) {
  errno = 0;
  const bool written = std::fwrite(text.data(), 1, text.size(), stdout) == text.size();
  if (written && std::fflush(stdout) == 0) return absl::OkStatus();
  // Who has read enough closes the pipe: nothing is wrong.
  if (errno == EPIPE) return absl::OkStatus();
  return Error(ExitCode::kCannotSave,
               std::string("cannot write to standard output: ") + std::strerror(errno));
}

void PrintNotice(const std::string& line) { std::fprintf(stderr, "krait: %s\n", line.c_str()); }

}  // namespace krait
