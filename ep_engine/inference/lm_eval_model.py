"""An engine checkpoint as a model of lm-eval, on one rank or on several.

lm-eval is told of one process: every rank asks for the same, ranks share the requests and the experts, and all have
every answer. lm-eval's own way would give each rank requests of its own, and as many passes as it likes.

Imported only where lm-eval is asked for.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ep_engine.errors import UserError
from ep_engine.inference.generate import Sampling, continue_all
from ep_engine.inference.loaded_model import LoadedModel
from ep_engine.progress import bar

_MOST_NEW_TOKENS = 256  # where a task does not say; HFLM's number

Scored = tuple[float, bool]
"""Log-likelihood of a continuation, and whether it is what greedy decoding gives."""


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm_eval ships no types
    """What lm-eval asks of a model: log-likelihoods, those of whole texts, and continuations.

    Args:
        loaded: the checkpoint on its ranks.
        tokenizer: of Hugging Face.
        batch_size: requests of a rank at once.
        show: show progress, where there is a terminal.
    """

    def __init__(self, loaded: LoadedModel, tokenizer: Any, batch_size: int, *, show: bool = False) -> None:
        super().__init__()
        self.loaded, self.tokenizer, self.batch_size, self.show = loaded, tokenizer, batch_size, show
        self.max_length = loaded.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        end: int = self.tokenizer.eos_token_id
        return end

    @property
    def prefix_token_id(self) -> int:
        """What a text is conditioned on that has nothing before it."""
        begin: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; a beginning that it has already is not added again, as in lm-eval's HFLM."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        tokens: list[int] = self.tokenizer.encode(string, **options)
        if max(tokens, default=0) >= self.loaded.config.vocab_size:
            raise UserError(
                f"the tokenizer gives id {max(tokens)}, outside of the model's vocabulary of "
                f"{self.loaded.config.vocab_size}; use the tokenizer that the model was made for"
            )
        return tokens

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Scored]:
        """As lm-eval defines it, without its progress bar."""
        found: list[Scored] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts: windows that overlap in context and not in what is scored."""
        asked, of_request = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, windows):
                asked.append((("", ""), context, continuation))
                of_request.append(number)
        totals = [0.0] * len(requests)
        for number, (score, _) in zip(of_request, self._loglikelihood_tokens(asked), strict=True):
            totals[number] += score
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Continuations of texts up to a task's stop sequences, requests with the same options together."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        found = [""] * len(requests)
        for options, numbers in alike.items():
            contexts = [requests[number].args[0] for number in numbers]
            for number, text in zip(numbers, self._continue(contexts, json.loads(options)), strict=True):
                found[number] = text
        return found

    def _continue(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        options = dict(normalize_gen_kwargs(options, _MOST_NEW_TOKENS))
        new_tokens, end_text = options["max_gen_toks"], self.tokenizer.decode([self.eot_token_id])
        if new_tokens >= self.max_length:
            raise UserError(
                f"the task generates {new_tokens} tokens, the model has {self.max_length} positions, and the prompt "
                "needs one at least; leave the task out"
            )
        stops = [stop for stop in handle_stop_sequences(options["until"], eos=end_text) if stop]

        def ends(tokens: Sequence[int]) -> bool:
            return tokens[-1] == self.eot_token_id or any(stop in self.tokenizer.decode(tokens) for stop in stops)

        sampling = Sampling(options.get("temperature") or 0.0, options.get("top_p", 1.0))
        prompts = [self.tok_encode(context)[-(self.max_length - new_tokens) :] for context in contexts]
        with bar("continuing texts", len(prompts), show=self.show) as advance:
            found = continue_all(
                self.loaded,
                [prompt or [self.prefix_token_id] for prompt in prompts],
                new_tokens,
                ends,
                sampling if options["do_sample"] else Sampling(),
                batch_size=self.batch_size,
                advance=advance,
            )
        texts = self.tokenizer.batch_decode(found, skip_special_tokens=True)
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Scored]:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(
                f"a task scores {longest} tokens at once, the model has {self.max_length} positions; leave the task out"
            )
        # Longest first: rows of a batch are of about the same length, and what does not fit shows at once.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        asked = [requests[i][1:] for i in order]
        scored: list[Scored] = []
        with bar("scoring continuations", len(asked), show=self.show) as advance:
            for answers in self.loaded.share_out(asked, self.batch_size, self._score):
                scored += answers
                advance(len(scored))
        found: list[Scored] = [(0.0, False)] * len(requests)
        for i, answer in zip(order, scored, strict=True):
            found[i] = answer
        return found

    @torch.no_grad()
    def _score(self, own: list[tuple[list[int], list[int]]]) -> list[Scored]:
        rows = [(context + continuation)[-self.max_length - 1 : -1] for context, continuation in own]
        width, device = max(map(len, rows), default=1), self.loaded.device
        padded = [row + [0] * (width - len(row)) for row in rows]  # behind a row: nothing looks there
        ids_BS = torch.tensor(padded, dtype=torch.int64, device=device).view(len(rows), width)
        logits_BSV = self.loaded.model(ids_BS)
        found = []
        for row, logits_SV, (_, continuation) in zip(rows, logits_BSV, own, strict=True):
            targets_S = torch.tensor(continuation, device=device)
            of_targets_SV = logits_SV[len(row) - len(continuation) : len(row)].float().log_softmax(dim=-1)
            scores_S = of_targets_SV.gather(1, targets_S.unsqueeze(1))
            found.append((float(scores_S.double().sum()), bool((of_targets_SV.argmax(dim=-1) == targets_S).all())))
        return found
