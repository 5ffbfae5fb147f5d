"""fastrl inside other trainers: each module here replaces a host's log-probability, never its loss formulas.

| module     | host                                                                            |
|------------|---------------------------------------------------------------------------------|
| `trl`      | TRL's trainers: `accelerate(trainer)`                                           |
| `hf`       | a Hugging Face model, in `transformers.Trainer` or any loop: `accelerate(model)` |
| `verl`     | veRL: `VERL_USE_EXTERNAL_MODULES=fastrl.integrations.verl`                      |
| `prime_rl` | prime-rl: `[trainer.loss] type = "custom"`, and its fused head                  |
| `torchtitan` | torchtitan: a `BaseLoss` on hidden states                                     |
| `axolotl`  | axolotl: a class for its `plugins:`                                             |

`accelerate` returns a `Handle`, whose `undo()` gives the host its own objects back.
"""
