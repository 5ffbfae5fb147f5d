// Python's view of the CUDA kernels: plain addresses, sizes, a device and a stream in, nothing out, the interpreter lock
// released. No torch headers: one build serves every torch version. Who calls has checked every argument.
#include <pybind11/pybind11.h>

#include "cuda/device.h"

namespace py = pybind11;

namespace {

using namespace FASTRL_ISA;
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename Launch>
void on(int device, Launch launch) {
  py::gil_scoped_release unlocked;
  use_device(device);
  launch();
}

Logprob logprob(int dtype, Address logits, int64_t stride, int64_t rows, int64_t vocabulary, Address targets,
                Address temperature, bool temperature_per_row, int64_t ignore_index) {
  return {Dtype(dtype),          at<void>(logits),    stride,       rows,         vocabulary, at<int64_t>(targets),
          at<void>(temperature), temperature_per_row, ignore_index, /*threads=*/0};
}

HeadChunk head_chunk(int dtype, Address logits, int64_t rows, int64_t vocabulary, Address targets, Address bias,
                     Address temperature, bool temperature_per_row, double softcap, double logit_scale) {
  return {Dtype(dtype),          at<void>(logits),    rows,    vocabulary, at<int64_t>(targets), at<void>(bias),
          at<void>(temperature), temperature_per_row, softcap, logit_scale};
}

PolicySpec policy_spec(int surrogate, double low, double high, double dual, double tau_pos, double tau_neg,
                       bool sequence_ratio, bool shared_ratio, int kl, double kl_coef, int correction,
                       bool sequence_correction, double correction_low, double correction_high, double entropy_coef) {
  return {Surrogate(surrogate),
          low,
          high,
          dual,
          tau_pos,
          tau_neg,
          sequence_ratio,
          shared_ratio,
          KLKind(kl),
          kl_coef,
          CorrectionKind(correction),
          sequence_correction,
          correction_low,
          correction_high,
          entropy_coef};
}

PolicyLossCall policy_call(const PolicySpec& spec, int dtype, int64_t count, Address logps, Address advantages,
                           Address weights, Address mask, Address old_logps, Address ref_logps, Address sampling_logps,
                           Address entropy, Address sequence_ids, int64_t sequences, Address loss, Address dlogps,
                           Address dentropy, Address metrics) {
  return {spec,
          Dtype(dtype),
          count,
          at<void>(logps),
          at<void>(advantages),
          at<void>(weights),
          at<uint8_t>(mask),
          at<void>(old_logps),
          at<void>(ref_logps),
          at<void>(sampling_logps),
          at<void>(entropy),
          at<int64_t>(sequence_ids),
          sequences,
          /*threads=*/0,
          at<void>(loss),
          at<void>(dlogps),
          at<void>(dentropy),
          at<void>(metrics)};
}

Gae gae_call(int dtype, Address rewards, Address values, Address mask, Address bounds, int64_t sequences,
             int64_t tokens, double gamma, double lam, Address advantages, Address returns) {
  return {Dtype(dtype),
          at<void>(rewards),
          at<void>(values),
          at<uint8_t>(mask),
          at<int64_t>(bounds),
          sequences,
          tokens,
          gamma,
          lam,
          /*threads=*/0,
          at<void>(advantages),
          at<void>(returns)};
}

GroupRewards group_rewards(int dtype, Address rewards, Address group, int64_t count, int baseline, int scale,
                           double eps) {
  return {Dtype(dtype), at<void>(rewards), at<int64_t>(group), count, Baseline(baseline), Scale(scale), eps};
}

}  // namespace

// The types are the CPU module's too: each module has its own Python classes of them.
#define CLASS(name, make) py::class_<name>(m, #name, py::module_local()).def(py::init(&make))

PYBIND11_MODULE(FASTRL_CUDA_MODULE, m) {
  m.doc() = "CUDA kernels; addresses are checked by fastrl.kernels.cuda.";
  m.attr("architectures") = FASTRL_CUDA_ARCHITECTURES;

  CLASS(Logprob, logprob);
  m.def("logprob_forward", [](const Logprob& a, Address logps, Address entropy, int device, Address stream) {
    on(device, [&] { logprob_forward({a, at<void>(logps), at<void>(entropy)}, at<void>(stream)); });
  });
  m.def("logprob_backward", [](const Logprob& a, Address grad_logps, Address grad_entropy, Address grad_logits,
                               int device, Address stream) {
    on(device, [&] {
      logprob_backward({a, at<void>(grad_logps), at<void>(grad_entropy), at<void>(grad_logits)}, at<void>(stream));
    });
  });

  CLASS(HeadChunk, head_chunk);
  m.def("head_gradient", [](const HeadChunk& a, bool kept, Address from_rows, Address to_rows, Address logps,
                            Address lse, Address entropy, Address grad_logps, Address grad_entropy, int out_dtype,
                            Address out, int device, Address stream) {
    on(device, [&] {
      head_gradient({a, kept, at<int64_t>(from_rows), at<int64_t>(to_rows), at<void>(logps), at<void>(lse),
                     at<void>(entropy), at<void>(grad_logps), at<void>(grad_entropy), Dtype(out_dtype), at<void>(out)},
                    at<void>(stream));
    });
  });

  CLASS(GroupRewards, group_rewards);
  m.def("group_advantages_scratch", &group_advantages_scratch);
  m.def("group_advantages", [](const GroupRewards& a, Address advantages, Address scratch, int device, Address stream) {
    on(device, [&] { group_advantages(a, at<void>(advantages), at<void>(scratch), at<void>(stream)); });
  });

  CLASS(PolicySpec, policy_spec);
  CLASS(PolicyLossCall, policy_call);
  m.def("head_statistics", [](const HeadChunk& a, Address logps, Address lse, Address entropy, Address summaries,
                              int device, Address stream) {
    on(device, [&] {
      head_statistics({a, at<void>(logps), at<void>(lse), at<void>(entropy), at<void>(summaries), /*tokens=*/nullptr,
                       /*loss=*/{}},
                      at<void>(stream));
    });
  });
  m.def("head_statistics_with_loss", [](const HeadChunk& a, Address logps, Address lse, Address entropy, Address tokens,
                                        const PolicyLossCall& loss, int device, Address stream) {
    on(device, [&] {
      head_statistics(
          {a, at<void>(logps), at<void>(lse), at<void>(entropy), /*summaries=*/nullptr, at<int64_t>(tokens), loss},
          at<void>(stream));
    });
  });
  m.def("policy_loss_scratch", &policy_loss_scratch);
  m.def("policy_loss",
        [](const PolicyLossCall& a, const GroupRewards& rewards, Address scratch, int device, Address stream) {
          on(device, [&] { policy_loss(a, rewards, at<void>(scratch), at<void>(stream)); });
        });

  CLASS(Gae, gae_call);
  m.def("gae_scratch", &gae_scratch);
  m.def("gae", [](const Gae& a, Address scratch, int device, Address stream) {
    on(device, [&] { gae(a, at<void>(scratch), at<void>(stream)); });
  });
}
