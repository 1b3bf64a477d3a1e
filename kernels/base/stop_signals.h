// Requests to stop: SIGUSR1, SIGTERM, SIGHUP and SIGINT only set a flag, which long work reads
// where it can end cleanly. A second SIGINT ends the process at once.
//
// A rank that mpirun started: SIGUSR1 only. Mpirun passes it on to all ranks, and has about a
// second between SIGTERM and SIGKILL, too little to save: SIGTERM ends a rank at once.
#ifndef KRAIT_KERNELS_BASE_STOP_SIGNALS_H_
#define KRAIT_KERNELS_BASE_STOP_SIGNALS_H_

namespace krait {

// Installs the handlers for the lifetime of the object and restores what was before. Also ignores
// SIGPIPE and SIGXFSZ, so that a closed terminal or a file size limit is an error code of write()
// and not the death of the process. At most one object at a time.
class StopSignals {
 public:
  // `acknowledgement`, a string literal of one line, is written to standard error at the first
  // SIGINT: who pressed Ctrl-C learns what happens, and that a second one ends it at once.
  // `of_a_rank`: this process is one of several ranks.
  explicit StopSignals(const char* acknowledgement, bool of_a_rank = false);
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

 private:
  bool was_held_ = false;
};

// From here on SIGUSR1 waits, through an execv too, for the first StopSignals object: a request
// that comes while a program starts is not its death. Before other threads are made. A program that
// makes no such object lets it through.
void HoldStopSignal();
void LetStopSignalThrough();

// Whether a stop signal has arrived since the StopSignals object at hand was made; false without
// one. Any thread.
bool StopRequested();

}  // namespace krait

#endif  // KRAIT_KERNELS_BASE_STOP_SIGNALS_H_
