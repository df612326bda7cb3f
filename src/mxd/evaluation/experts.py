"""What single experts fire on, as pages of a report."""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mxd.data.tokenization import Tokenizer, token_pieces
from mxd.evaluation.collect import LatentStatistics, choose_experts
from mxd.evaluation.faithfulness import Candidate
from mxd.evaluation.report import ExpertExample, ExpertPage
from mxd.models import device_of, mlp_pairs


@torch.no_grad()
def expert_pages(
    model: nn.Module,
    candidate: Candidate,
    statistics: LatentStatistics,
    contexts: Int[Tensor, "n context"],
    tokenizer: Tokenizer,
    *,
    count: int = 10,
    module_path: str | None = None,
) -> list[ExpertPage]:
    """Return a page for each of some latents, chosen by how often they fire and not by how good they look.

    Args:
        model: The language model.
        candidate: The sparse layer.
        statistics: What its latents fired on in these contexts.
        contexts: The text.
        tokenizer: Turns tokens into text.
        count: Number of latents.
        module_path: Where the MLPs are, in a family that is not listed.
    """
    pages: list[ExpertPage] = []
    for latent in choose_experts(statistics, count):
        top = statistics.top_contexts(latent)
        shown = contexts[[activation.context for activation in top]].to(device_of(model))
        pair = mlp_pairs(model, shown, [candidate.layer], module_path=module_path)[candidate.layer]
        code = candidate.network.encode(candidate.network.given(*pair).float())
        values = torch.where(code.indices == latent, code.values, 0).sum(-1)
        examples = [
            ExpertExample(pieces, row, activation.position)
            for pieces, row, activation in zip(
                token_pieces(tokenizer, shown.tolist()), values.tolist(), top, strict=True
            )
        ]
        pages.append(
            ExpertPage(
                index=latent,
                firing_rate=float(statistics.firing_rates[latent]),
                max_value=float(statistics.maxima[latent]),
                examples=examples,
            )
        )
    return pages
