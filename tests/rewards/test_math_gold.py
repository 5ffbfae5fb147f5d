"""Gold answers as MATH, DAPO, GSM8K and hand-made tables write them, what is right and what only stands in them."""

import pytest

from fastrl.rewards import resolve_reward

# gold; another way to write it, which is right; what is wrong: a number in it, or the thing it is easily taken for
GOLDS = [
    # numbers
    ("34", "34", "3"),
    ("-3", "-3", "3"),
    ("−3", "-3", "3"),
    ("007", "7", "0"),
    ("0", "0", "1"),
    (".5", r"\frac12", "5"),
    ("0.5", r"\frac{1}{2}", "5"),
    ("1/2", "0.5", "2"),
    ("-1/2", "-0.5", "1/2"),
    ("7 1/2", "7.5", "7"),
    (r"3\frac{1}{2}", "3.5", r"\frac{1}{2}"),
    (r"\frac12", "0.5", "12"),
    (r"\dfrac{5}{3}", r"\frac{10}{6}", "5"),
    (r"-\tfrac{3}{4}", "-0.75", "0.75"),
    ("1,234", "1234", "1"),
    ("1{,}234", "1234", "1"),
    (r"32,\!000", "32000", "32"),
    ("1e-3", "0.001", "1"),
    ("6.02e23", r"6.02\times 10^{23}", "6.02"),
    (r"1.5\times 10^{8}", "150000000", "1.5"),
    (r"10^{-3}", "0.001", "10"),
    (r"1011_2", "1011_2", "2"),
    # units, money, percentages
    (r"12\text{ cm}", "12", "2"),
    (r"12 \mbox{ inches}", "12", "2"),
    (r"24\text{ cm}^2", "24", "2"),
    (r"10 \mathrm{~m}", "10", "1"),
    (r"5\sqrt{2}\text{ cm}", r"\sqrt{50}", "5"),
    ("15 miles", "15", "5"),
    (r"45^\circ", "45", "4"),
    (r"\$18.50", "18.5", "18"),
    ("$18.50", "18.5", "18"),
    (r"10\%", "10", "1"),
    ("5%", "5", "50"),
    # constants, powers, roots, functions
    (r"2\pi", r"\pi\cdot 2", "2"),
    ("2*pi", r"2\pi", "2"),
    ("2π", r"2\pi", "2"),
    (r"\frac{\pi}{6}", r"\pi/6", "6"),
    (r"2\sqrt{3}", r"\sqrt{12}", "2"),
    ("√3", r"\sqrt{3}", "3"),
    (r"\sqrt[3]{4}", r"4^{1/3}", "4"),
    (r"3^{20}", "3486784401", "3"),
    ("3**2", "9", "3"),
    (r"2^{10}-1", "1023", "1"),
    (r"10!", "3628800", "10"),
    (r"\binom{10}{3}", "120", "10"),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}", "3"),
    (r"\ln 2", r"\ln 2", "2"),
    (r"\cos \theta", r"\cos\theta", r"\sin\theta"),
    (r"e^{i\pi/4}", r"e^{\frac{i\pi}{4}}", "4"),
    ("1+2i", "2i+1", "1"),
    (r"\infty", r"\infty", "0"),
    # expressions and equations
    ("5x", r"5\cdot x", "5"),
    ("2n+1", "1+2n", "2"),
    ("x^2+2x+1", "(x+1)^2", "1"),
    ("(x-1)(x+2)", "x^2+x-2", "2"),
    (r"k = 2\pi", r"2\pi", "2"),
    ("x=5", "5", "x"),
    ("y = 2x+3", "2x+3", "3"),
    ("f(x)=x^2", "x^2", "2"),
    ("x+y=1", "y=1-x", "1"),
    ("x^2+y^2=4", "x^2+y^2-4=0", "4"),
    # several values, in order or not
    ("(1, 2)", "(1,2)", "2"),
    ("(1, 2)", "(1,2)", "(2,1)"),
    (r"\left(3, \frac{\pi}{2}\right)", r"(3, \pi/2)", "3"),
    ("1,2,3", "3,2,1", "1.2"),
    ("5, -3", "-3, 5", "-3"),
    (r"\{1,2,3\}", r"\{3,2,1\}", "3"),
    ("2 or 3", "3, 2", "2"),
    (r"2 \text{ or } 3", "2, 3", "3"),
    ("x = 3 or x = -1", "x=-1, x=3", "3"),
    (r"\pm 2", "2, -2", "2"),
    (r"2 \pm \sqrt{3}", r"2-\sqrt{3}, 2+\sqrt{3}", "2"),
    ("3:4", "3:4", "3"),
    # intervals, inequalities, matrices
    ("[0,1)", "[0, 1)", "[0,1]"),
    (r"(-\infty, 3]", r"(-\infty,3]", "3"),
    (r"(-\infty,-2)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,-2)", "2"),
    (r"x \in [1,2]", "[1,2]", "2"),
    (r"x \geq 2", r"x\ge 2", "2"),
    (r"-1 \le x \le 1", r"-1\leq x\leq 1", "1"),
    (r"\emptyset", r"\emptyset", "0"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "2"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", "4"),
    # text and choices
    (r"\text{Monday}", "Monday", "Tuesday"),
    ("Evelyn", r"\text{Evelyn}", "Evelny"),
    (r"\text{(A)}", "A", "B"),
    (r"\textbf{(B)}", r"\text{B}", "A"),
    ("C", "(C)", "D"),
    ("no solution", r"\text{no solution}", "0"),
    # in a text
    (r"\boxed{5}", "5", "50"),
    (r"The sum is $\frac{1}{2}$", "0.5", "2"),
    (r"\(7\)", "7", "70"),
    ("48 + 24 = <<48+24=72>>72\n#### 72", "72", "48"),
    ("16 - 3 = 13\n#### 1,018", "1018", "13"),
]


@pytest.fixture(scope="module")
def judge():
    reward = resolve_reward("math_answer", timeout_s=100.0)  # a busy machine is no wrong answer
    return lambda gold, answer: reward(completions=[rf"So it is $\boxed{{{answer}}}$."], answer=[gold])[0]


@pytest.mark.parametrize(("gold", "right", "wrong"), GOLDS)
def test_a_gold_answer_is_that_expression_and_no_number_in_it(judge, gold, right, wrong):
    assert (judge(gold, right), judge(gold, wrong)) == (1.0, 0.0)


@pytest.mark.parametrize(
    "gold", sorted({gold for gold, _, _ in GOLDS if not {"$", "#"} & set(gold) and "boxed" not in gold})
)
def test_an_answer_written_as_the_gold_answer_is_right(judge, gold):
    assert judge(gold, gold) == 1.0


@pytest.mark.parametrize("gold", [r"4\text{ hours and }30\text{ minutes}", r"1, 2, \ldots, 10", "5'10\"", "", "   "])
def test_where_only_a_part_of_a_gold_answer_would_be_compared_the_reward_does_not_apply(judge, gold):
    assert judge(gold, "4") is None
