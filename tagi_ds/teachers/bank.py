"""Several teachers' factors over one frozen backbone.

A batch mixes examples of all teachers, and each run of a teacher's examples meets its factors through the same adapter
hooks as the generated ones, so that the backbone's forward is shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tagi_ds.model.adapter import STATE_KEYWORD, LowRank, Site, TaskState, install
from tagi_ds.model.head import READ_KEYWORD, Reader, accept_reader


def common_a(sites: Sequence[Site], rank: int, seed: int) -> dict[str, Tensor]:
    """The A ~ N(0, 1 / d_in) from which all teachers of a store start: site -> (r, d_in)."""
    generator = torch.Generator().manual_seed(seed)
    return {site.name: torch.randn(rank, site.d_in, generator=generator) * site.d_in**-0.5 for site in sites}


class TeacherBank(nn.Module):
    """T teachers' factors over one frozen backbone.

    Args:
        backbone: an encoder-decoder; its hooks are installed here and its parameters frozen.
        sites: the adapted linears.
        teachers: T.
        start: common A by site.
        scaling: alpha / r.
        train_a: False keeps A at the common one.

    Raises:
        ValueError: the backbone already answers to teachers of other sites or another scaling.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sites: list[Site],
        teachers: int,
        start: dict[str, Tensor],
        scaling: float,
        train_a: bool,
    ) -> None:
        super().__init__()
        self.names = [site.name for site in sites]
        self.a = nn.ParameterList(
            nn.Parameter(start[site.name].expand(teachers, -1, -1).clone(), requires_grad=train_a) for site in sites
        )
        self.b = nn.ParameterList(
            nn.Parameter(torch.zeros(teachers, site.d_out, start[site.name].shape[0])) for site in sites
        )
        self._backbone = (backbone,)  # a tuple: the bank's parameters are the teachers' alone
        backbone.requires_grad_(False)
        installed = getattr(backbone, "_teacher_hooks", None)
        if installed is None:
            install(backbone, sites, scaling)
            accept_reader(backbone, backbone.get_output_embeddings())  # type: ignore[operator]
            backbone._teacher_hooks = (self.names, scaling)  # type: ignore[assignment]
        elif installed != (self.names, scaling):
            raise ValueError("the backbone answers to teachers of other sites or another scaling; load it anew")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        index: Tensor | None,
        read: Reader | None = None,
    ) -> Any:
        """Logits (N, T, V) of inputs (N, L); with a reader its figures instead.

        Args:
            input_ids, attention_mask: (N, L).
            labels: (N, T).
            index: (R,), the teacher of each of R runs of N / R examples; None: all teachers in order, a run each.
            read: the reader.
        """
        (backbone,) = self._backbone
        found = backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=backbone._shift_right(labels),  # type: ignore[operator]
            use_cache=False,
            **{STATE_KEYWORD: TaskState(self._adapters(), index=index), READ_KEYWORD: read},
        )
        return found.logits if read is None else found

    @torch.no_grad()
    def answer(self, input_ids: Tensor, attention_mask: Tensor, index: Tensor | None, longest: int) -> Tensor:
        """Greedy answers (N, at most `longest`) of token ids, padded with 0 behind their end.

        Args:
            input_ids, attention_mask: (N, L).
            index: (R,), the teacher of each of R runs of N / R inputs; None: all teachers in order, a run each.
            longest: tokens of an answer at the most.
        """
        (backbone,) = self._backbone
        extra = {STATE_KEYWORD: TaskState(self._adapters(), index=index)}
        config: Any = backbone.config
        encoder: Any = backbone.get_encoder()  # type: ignore[operator]
        encoded = encoder(input_ids=input_ids, attention_mask=attention_mask, **extra)
        token = input_ids.new_full((len(input_ids), 1), config.decoder_start_token_id)
        ended, cache, answer = torch.zeros_like(token, dtype=torch.bool), None, []
        for _ in range(longest):
            output = backbone(
                encoder_outputs=encoded,
                attention_mask=attention_mask,
                decoder_input_ids=token,
                past_key_values=cache,
                use_cache=True,
                **extra,
            )
            cache = output.past_key_values
            token = output.logits[:, -1:].argmax(-1).masked_fill(ended, 0)
            answer.append(token)
            ended = ended | (token == config.eos_token_id)
            if bool(ended.all()):
                break
        return torch.cat(answer, dim=1)

    @torch.no_grad()
    def load(self, teacher: int, factors: Mapping[str, LowRank]) -> None:
        """Overwrites one teacher's factors: site -> a (r, d_in), b (d_out, r)."""
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            a[teacher].copy_(factors[name].a)
            b[teacher].copy_(factors[name].b)

    def snapshot(self, teacher: int) -> dict[str, LowRank]:
        """One teacher's factors, copied to the CPU."""
        return {
            name: LowRank(a[teacher].detach().cpu().clone(), b[teacher].detach().cpu().clone())
            for name, a, b in zip(self.names, self.a, self.b, strict=True)
        }

    def _adapters(self) -> dict[str, LowRank]:
        return {name: LowRank(a, b) for name, a, b in zip(self.names, self.a, self.b, strict=True)}
