"""What reward models learned from preferences, and what they resisted: `fastrl analyze rewards ROWS`.

The three measures of SEAL, arXiv:2408.10270, of pairs (t_c, t_r) of texts, of which a human preferred t_c. A reward r
is aligned with the human on a pair if r(t_c) > r(t_r); a tie is not.

- Feature imprint: beta of r(t) = alpha_i + sum_f beta_f 1[f in t] + e over both texts t of every pair i, each pair with
  an effect alpha_i; of r after alignment, before it, and of the shift from one to the other.
- Alignment resistance: the share of pairs on which r is not aligned; how pairs moved from before to after.
- Alignment robustness: which pairs cease to be aligned once their texts are rewritten with the same meaning, and how
  much likelier that is where the rewriting took a feature away or added one.

A row of the input is a pair. Its columns, of which only the first line must be there:

    chosen_reward, rejected_reward           after alignment
    chosen_reward_pre, rejected_reward_pre   before alignment
    chosen_NAME, rejected_NAME               feature NAME of each text: true, false, 1 or 0
    rewritten_...                            any of the above, of the rewritten texts
    labeler                                  what a judge prefers: chosen, rejected or indifferent
    prompt, chosen, rejected                 the texts, from which --model and --pre compute the rewards
    id                                       a name for the pair
"""

from fastrl.analyze.measures import Analysis, analyze
from fastrl.analyze.pairs import Pairs, read_pairs, scored

__all__ = ["Analysis", "Pairs", "analyze", "read_pairs", "scored"]
