// Python's view of the CPU kernels: plain addresses and sizes in, nothing out, the interpreter lock released.
// No torch headers: one build serves every torch version. Who calls has checked every argument.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace py = pybind11;

namespace {

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
[[maybe_unused]] bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The processor has tiles of bfloat16 and Linux lets this process use them, which it must be asked for once.
bool ask_for_amx() {
#if defined(__linux__)
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;  // cpuid leaf 7, edx
  constexpr long request_permission = 0x1023, tile_data = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & amx_bf16) || !(edx & amx_tile)) return false;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
[[maybe_unused]] bool has_amx() {
  static const bool granted = has_avx512_bf16() && ask_for_amx();
  return granted;
}
#endif

// What this build has and this processor can run, best first. FASTRL_HAS_x: the compiler knew x.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(FASTRL_HAS_amx)
  if (has_amx()) found.push_back(kernels_amx());
#endif
#if defined(FASTRL_HAS_avx512_bf16)
  if (has_avx512_bf16()) found.push_back(kernels_avx512_bf16());
#endif
#if defined(FASTRL_HAS_avx512)
  if (has_avx512()) found.push_back(kernels_avx512());
#endif
#if defined(FASTRL_HAS_avx2)
  if (has_avx2()) found.push_back(kernels_avx2());
#endif
  found.push_back(kernels_scalar());
#if defined(FASTRL_HAS_amx_emulated)
  if (has_avx512_bf16()) found.push_back(kernels_amx_emulated());  // last: only for who asks for it
#endif
  return found;
}

const Kernels* chosen = available().front();

void use(const std::string& name) {
  std::string names;
  for (const Kernels* kernels : available()) {
    if (name == kernels->name) {
      chosen = kernels;
      return;
    }
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  throw std::invalid_argument("isa: expected one of " + names + ", got " + name);
}

using Address = std::uintptr_t;
template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Head head(int dtype, Address hidden, Address weight, Address bias, int64_t hidden_stride, int64_t weight_stride,
          int64_t width, int64_t vocabulary, Address rows, int64_t count, int64_t all, Address targets,
          Address temperature, bool temperature_per_row, double softcap, double logit_scale, bool reduced_float32,
          int threads) {
  return {Dtype(dtype),
          at<void>(hidden),
          at<void>(weight),
          at<void>(bias),
          hidden_stride,
          weight_stride,
          width,
          vocabulary,
          at<int64_t>(rows),
          count,
          all,
          at<int64_t>(targets),
          at<void>(temperature),
          temperature_per_row,
          softcap,
          logit_scale,
          reduced_float32,
          threads};
}

Logprob logprob(int dtype, Address logits, int64_t stride, int64_t rows, int64_t vocabulary, Address targets,
                Address temperature, bool temperature_per_row, int64_t ignore_index, int threads) {
  return {Dtype(dtype),          at<void>(logits),    stride,       rows,   vocabulary, at<int64_t>(targets),
          at<void>(temperature), temperature_per_row, ignore_index, threads};
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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels; addresses are checked by fastrl.kernels.native.";
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : available()) names.push_back(kernels->name);
    py::list list;
    for (const auto& name : names) list.append(name);
    return list;
  });
  m.def("isa", [] { return std::string(chosen->name); });
  m.def("use", use, py::arg("isa"));
  m.def("lane_tile", [](bool is_double) { return chosen->lane_tile[is_double]; });

  py::class_<Head>(m, "Head").def(py::init(&head));
  m.def("head_forward", [](const Head& h, Address logps, Address lse, Address entropy, Address logits,
                           Address summaries) {
    py::gil_scoped_release unlocked;
    chosen->head_forward({h, at<void>(logps), at<void>(lse), at<void>(entropy), at<void>(logits), at<void>(summaries)});
  });
  m.def("head_keep", [](const Head& h, Address lse, Address logits, Address kept) {
    py::gil_scoped_release unlocked;
    chosen->head_keep({h, at<void>(lse), at<void>(logits), at<void>(kept)});
  });
  m.def("decode_attention",
        [](int dtype, Address query, Address keys, Address values, Address mask, Address out, int64_t rows,
           int64_t heads, int64_t key_heads, int64_t seen, int64_t width, int64_t row_stride, int64_t head_stride,
           int64_t mask_stride, double scale, int threads) {
          py::gil_scoped_release unlocked;
          chosen->decode_attention({Dtype(dtype), at<void>(query), at<void>(keys), at<void>(values), at<float>(mask),
                                    at<void>(out), rows, heads, key_heads, seen, width, row_stride, head_stride,
                                    mask_stride, scale, threads});
        });
  m.def("head_backward",
        [](const Head& h, Address logps, Address lse, Address entropy, Address grad_logps, Address grad_entropy,
           Address logits, Address kept, Address places, int64_t stored, Address grad_hidden, Address grad_weight,
           Address grad_bias, bool add_weight, bool round_weight) {
          py::gil_scoped_release unlocked;
          chosen->head_backward({h, at<void>(logps), at<void>(lse), at<void>(entropy), at<void>(grad_logps),
                                 at<void>(grad_entropy), at<void>(logits), at<void>(kept), at<int64_t>(places), stored,
                                 at<void>(grad_hidden), at<void>(grad_weight), at<void>(grad_bias), add_weight,
                                 round_weight});
        });

  m.def("linear_forward",
        [](int dtype, int64_t rows, int64_t width, int64_t outputs, int threads, Address x, Address weight,
           Address bias, Address y, int64_t x_stride, int64_t weight_stride, int64_t y_stride, bool add) {
          py::gil_scoped_release unlocked;
          chosen->linear_forward({{Dtype(dtype), rows, width, outputs, threads},
                                  at<void>(x),
                                  at<void>(weight),
                                  at<void>(bias),
                                  at<void>(y),
                                  x_stride,
                                  weight_stride,
                                  y_stride,
                                  add});
        });
  m.def("linear_grad_input",
        [](int dtype, int64_t rows, int64_t width, int64_t outputs, int threads, Address dy, Address weight, Address dx,
           int64_t dy_stride, int64_t weight_stride, int64_t dx_stride, bool add) {
          py::gil_scoped_release unlocked;
          chosen->linear_grad_input({{Dtype(dtype), rows, width, outputs, threads},
                                     at<void>(dy),
                                     at<void>(weight),
                                     at<void>(dx),
                                     dy_stride,
                                     weight_stride,
                                     dx_stride,
                                     add});
        });
  m.def("linear_grad_weight", [](int dtype, int64_t rows, int64_t width, int64_t outputs, int threads, Address dy,
                                 Address x, Address dw, int64_t dy_stride, int64_t x_stride, bool add, bool round) {
    py::gil_scoped_release unlocked;
    chosen->linear_grad_weight({{Dtype(dtype), rows, width, outputs, threads},
                                at<void>(dy),
                                at<void>(x),
                                at<void>(dw),
                                dy_stride,
                                x_stride,
                                add,
                                round});
  });

  py::class_<Logprob>(m, "Logprob").def(py::init(&logprob));
  m.def("logprob_forward", [](const Logprob& call, Address logps, Address entropy) {
    py::gil_scoped_release unlocked;
    chosen->logprob_forward({call, at<void>(logps), at<void>(entropy)});
  });
  m.def("logprob_backward", [](const Logprob& call, Address grad_logps, Address grad_entropy, Address grad_logits) {
    py::gil_scoped_release unlocked;
    chosen->logprob_backward({call, at<void>(grad_logps), at<void>(grad_entropy), at<void>(grad_logits)});
  });

  py::class_<PolicySpec>(m, "PolicySpec").def(py::init(&policy_spec));
  m.def("policy_loss", [](const PolicySpec& spec, int dtype, int64_t count, Address logps, Address advantages,
                          Address weights, Address mask, Address old_logps, Address ref_logps, Address sampling_logps,
                          Address entropy, Address sequence_ids, int64_t sequences, int threads, Address loss,
                          Address dlogps, Address dentropy, Address metrics) {
    py::gil_scoped_release unlocked;
    chosen->policy_loss({spec, Dtype(dtype), count, at<void>(logps), at<void>(advantages), at<void>(weights),
                         at<uint8_t>(mask), at<void>(old_logps), at<void>(ref_logps), at<void>(sampling_logps),
                         at<void>(entropy), at<int64_t>(sequence_ids), sequences, threads, at<void>(loss),
                         at<void>(dlogps), at<void>(dentropy), at<void>(metrics)});
  });

  m.def("gae", [](int dtype, Address rewards, Address values, Address mask, Address bounds, int64_t sequences,
                  int64_t tokens, double gamma, double lam, int threads, Address advantages, Address returns) {
    py::gil_scoped_release unlocked;
    chosen->gae({Dtype(dtype), at<void>(rewards), at<void>(values), at<uint8_t>(mask), at<int64_t>(bounds), sequences,
                 tokens, gamma, lam, threads, at<void>(advantages), at<void>(returns)});
  });
  m.def("group_advantages", [](Address rewards, Address group, int64_t count, int64_t groups, int baseline, int scale,
                               double eps, Address advantages) {
    py::gil_scoped_release unlocked;
    chosen->group_advantages({at<double>(rewards), at<int64_t>(group), count, groups, Baseline(baseline), Scale(scale),
                              eps, at<double>(advantages)});
  });
}
