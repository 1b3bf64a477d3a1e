// The stacks of all threads of this process, for the report about a job that hangs.
#ifndef KRAIT_PARALLEL_THREAD_STACKS_H_
#define KRAIT_PARALLEL_THREAD_STACKS_H_

namespace krait {

// Installs the signal by which a thread is asked for its stack, and loads what unwinding needs:
// both may not be possible any more when a job hangs. Once, before WriteThreadStacks.
void PrepareThreadStacks();

// Writes them to a file descriptor, with all but the calling thread's. A thread that does not
// answer within a second (it blocks signals, or is in the kernel) is named with its state.
void WriteThreadStacks(int fd);

}  // namespace krait

#endif  // KRAIT_PARALLEL_THREAD_STACKS_H_
