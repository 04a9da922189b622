"""Figures of the paper: Sirius (arXiv 2409.03856), for other models than those of a report, so for their shape only.

The names of tasks are those of `sirius.evaluation.catalogue`; scores are shares from 0 to 1.
"""

from dataclasses import dataclass

SOURCE = "Sirius, arXiv 2409.03856"
LLAMA_3_8B_I, LLAMA_3_8B = "Llama-3-8B-Instruct", "Llama-3-8B"
LLAMA_2_7B_C, LLAMA_2_7B = "Llama-2-7B-chat", "Llama-2-7B"
LLAMA_2_13B_C, LLAMA_2_13B = "Llama-2-13B-chat", "Llama-2-13B"

# Table 1: where sparsity works and where it fails, half of the neurons kept; score of the full model, coarse and fine.
METRICS = {
    "cnn_dailymail": "ROUGE",
    "coqa": "F1",
    "truthfulqa_gen": "ROUGE-1",
    "gsm8k": "strict match",
    "humaneval": "pass@1",
    "mmlu_flan_cot_fewshot": "exact match",
}
TABLE_1: dict[str, dict[str, tuple[float, float, float]]] = {
    LLAMA_3_8B_I: {
        "cnn_dailymail": (0.1237, 0.1144, 0.1166),
        "coqa": (0.7825, 0.7977, 0.7984),
        "truthfulqa_gen": (0.4945, 0.4725, 0.5043),
        "gsm8k": (0.7551, 0.3859, 0.5868),
        "humaneval": (0.560, 0.207, 0.457),
        "mmlu_flan_cot_fewshot": (0.6231, 0.5558, 0.5304),
    },
    LLAMA_2_7B_C: {
        "cnn_dailymail": (0.1489, 0.1448, 0.1521),
        "coqa": (0.7580, 0.7639, 0.7540),
        "truthfulqa_gen": (0.4480, 0.4529, 0.4565),
        "gsm8k": (0.2396, 0.1334, 0.1979),
        "humaneval": (0.140, 0.067, 0.134),
        "mmlu_flan_cot_fewshot": (0.492, 0.4637, 0.4768),
    },
}


@dataclass(frozen=True)
class Published:
    """A line of the paper's Table 2.

    full, sparse, corrected  scores, 0 to 1
    width, period            w and K
    aal, effective_density   as the table prints them
    """

    model: str
    full: float
    sparse: float
    corrected: float
    width: int
    aal: float
    effective_density: float
    period: int = 16


KEEP = {"csqa_cot": 0.4}  # the fraction of neurons kept in Table 2; 0.5 in the other tasks

# Table 2: the full model, the sparse one, and the sparse one corrected; only the lines that could be had. Some values
# stand in two lines (coarse on HumanEval: Llama-3-8B and Llama-2-13B), which may be slips of the paper.
TABLE_2: dict[tuple[str, str], tuple[Published, ...]] = {
    ("gsm8k", "coarse"): (
        Published(LLAMA_3_8B_I, 0.7536, 0.3844, 0.7051, 8, 15.22, 0.706),
        Published(LLAMA_3_8B, 0.4966, 0.2085, 0.4177, 8, 15.29, 0.703),
        Published(LLAMA_2_7B_C, 0.2403, 0.1334, 0.2244, 8, 15.00, 0.757),
        Published(LLAMA_2_7B, 0.1357, 0.0758, 0.1183, 6, 15.87, 0.715),
        Published(LLAMA_2_13B_C, 0.3548, 0.2714, 0.3381, 4, 15.34, 0.730),
        Published(LLAMA_2_13B, 0.2282, 0.1759, 0.2418, 1, 15.34, 0.730),
    ),
    ("gsm8k", "fine"): (
        Published(LLAMA_3_8B_I, 0.7536, 0.5868, 0.7278, 4, 15.37, 0.807),
        Published(LLAMA_3_8B, 0.4966, 0.3199, 0.4579, 2, 15.03, 0.825),
        Published(LLAMA_2_7B_C, 0.2403, 0.1971, 0.2388, 6, 15.69, 0.819),
        Published(LLAMA_2_7B, 0.1357, 0.1137, 0.1410, 4, 15.91, 0.807),
        Published(LLAMA_2_13B_C, 0.3548, 0.3222, 0.3533, 1, 15.08, 0.842),
    ),
    ("csqa_cot", "coarse"): (
        Published(LLAMA_3_8B_I, 0.7073, 0.6470, 0.7076, 8, 14.76, 0.657),
        Published(LLAMA_3_8B, 0.6437, 0.5585, 0.6429, 8, 15.43, 0.628),
        Published(LLAMA_2_7B_C, 0.6248, 0.5200, 0.6175, 8, 15.07, 0.683),
        Published(LLAMA_2_7B, 0.4742, 0.4414, 0.4742, 8, 15.80, 0.652),
        Published(LLAMA_2_13B_C, 0.6879, 0.5536, 0.6691, 4, 11.43, 0.674, 12),
        Published(LLAMA_2_13B, 0.6109, 0.5601, 0.6060, 4, 15.72, 0.645),
    ),
    ("csqa_cot", "fine"): (
        Published(LLAMA_3_8B_I, 0.7073, 0.6158, 0.7043, 8, 15.66, 0.753),
        Published(LLAMA_3_8B, 0.6437, 0.533, 0.6388, 1, 15.00, 0.786),
        Published(LLAMA_2_7B_C, 0.6248, 0.6167, 0.6380, 4, 15.09, 0.811),
        Published(LLAMA_2_7B, 0.4742, 0.4717, 0.5012, 6, 15.89, 0.771),
        Published(LLAMA_2_13B_C, 0.6879, 0.533, 0.6691, 4, 14.30, 0.846),
        Published(LLAMA_2_13B, 0.6109, 0.5700, 0.5864, 4, 15.72, 0.770),
    ),
    ("humaneval", "coarse"): (
        Published(LLAMA_3_8B_I, 0.561, 0.207, 0.524, 8, 14.67, 0.733),
        Published(LLAMA_3_8B, 0.262, 0.067, 0.243, 8, 15.10, 0.691),
        Published(LLAMA_2_7B_C, 0.140, 0.067, 0.159, 8, 10.88, 0.789, 12),
        Published(LLAMA_2_7B, 0.116, 0.079, 0.128, 8, 14.84, 0.765),
        Published(LLAMA_2_13B_C, 0.189, 0.122, 0.171, 8, 11.12, 0.762, 12),
        Published(LLAMA_2_13B, 0.262, 0.067, 0.244, 8, 15.10, 0.741),
    ),
    ("humaneval", "fine"): (
        Published(LLAMA_3_8B_I, 0.561, 0.457, 0.616, 6, 15.42, 0.804),
        Published(LLAMA_3_8B, 0.262, 0.189, 0.298, 6, 15.54, 0.797),
        Published(LLAMA_2_7B_C, 0.140, 0.134, 0.165, 6, 15.27, 0.841),
    ),
}

# The oracle's curve on GSM8K, coarse, read off the paper's plot: percent of tokens replaced, score.
ORACLE: dict[str, tuple[tuple[float, float], ...]] = {
    LLAMA_3_8B_I: ((0, 0.386), (4, 0.665), (6, 0.707), (9, 0.735), (11.5, 0.755)),
    LLAMA_2_7B_C: ((0, 0.133), (4, 0.21), (9, 0.23), (10, 0.24)),
}
