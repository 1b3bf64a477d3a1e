// Save-and-stop requests: SIGUSR1, SIGTERM, SIGHUP and SIGINT only set a flag that the step loop
// reads at step boundaries. A second SIGINT ends the process at once.
#ifndef KRAIT_TRAINER_TRAIN_SIGNALS_H_
#define KRAIT_TRAINER_TRAIN_SIGNALS_H_

namespace krait {

// Installs the handlers for the lifetime of the object and restores the ones before. Also ignores
// SIGPIPE and SIGXFSZ, so that a closed terminal or a file size limit is an error code of write()
// and not the death of the run. At most one object at a time.
class StopSignals {
 public:
  StopSignals();
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  // The first signal received, or 0.
  int received() const;
};

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_SIGNALS_H_
