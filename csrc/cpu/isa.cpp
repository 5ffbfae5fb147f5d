// The kernels for one instruction set: compiled once for each, with FASTRL_ISA set to its name.
#include "attention.h"
#include "gae.h"
#include "group_advantages.h"
#include "head.h"
#include "linear.h"
#include "logprob.h"
#include "policy_loss.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

const Kernels* JOIN(kernels_, FASTRL_ISA)() {
  using namespace FASTRL_ISA;
  static const Kernels table = {
      TEXT(FASTRL_ISA),
      {Tile<Plain<Float>>::lanes, Tile<Plain<Array<double>>>::lanes},
      head_forward,
      head_keep,
      head_backward,
      linear_forward,
      linear_grad_input,
      linear_grad_weight,
      decode_attention,
      logprob_forward,
      logprob_backward,
      policy_loss,
      gae,
      group_advantages,
  };
  return &table;
}
