// What goes on inside the layers of a run: statistics for the metrics, and where numbers stop being
// finite. Both run a pass again with the model's probe, so that a step costs nothing when nobody
// asks.
#ifndef KRAIT_TRAINER_TRAIN_LAYER_STATISTICS_H_
#define KRAIT_TRAINER_TRAIN_LAYER_STATISTICS_H_

#include <string>
#include <vector>

#include "trainer/report/metrics.h"
#include "trainer/train/trainer.h"

namespace krait {

// Of the weights as they are on the first pass of `batch`, a forward pass and downloads (values of
// this rank's first 4096 tokens). All ranks call it; each has its own.
//
// layers/NN_KIND/max_abs: largest |output| of the sublayer, which is added to the stream.
// layers/NN_mamba/dt_p05, _p50, _p95: quantiles of the step size softplus(dt_raw + bias).
// layers/NN_mamba/min_a: smallest |A|; the slowest decay is exp(-dt * min_a).
// layers/NN_moe/entropy: mean entropy of the router, nats; log E where it does not choose.
// layers/NN_moe/load_min, _max: tokens of the least and most chosen expert over the mean.
std::vector<Metric> LayerStatistics(Trainer* trainer, const TokenBatch& batch);

// The first value of a step that was skipped, in the order of computation, that is not finite, in
// words: "the output of layer 3's mamba". Computes losses and gradients of `batch` again, from the
// weights that the step left as they were, and looks at the stream, the outputs and, backwards, the
// gradients of every sublayer. All ranks call it, and get the same.
std::string FirstNonFinite(Trainer* trainer, const TokenBatch& batch);

}  // namespace krait

#endif  // KRAIT_TRAINER_TRAIN_LAYER_STATISTICS_H_
