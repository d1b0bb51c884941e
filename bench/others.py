"""How others generate and judge on a network that is loaded: transformers, the notebook, CAPPr, lm-evaluation-harness.

Each way takes new prompts at each call, and says how many tokens or items it did. The end of text is switched off.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from logging import getLogger
from typing import Any

import numpy
import tokenizers
import torch
from timing import Left, Way
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging
from words import Words

from alpaca_core.prompts import ALPACA
from alpaca_core.tokenizer import Tokenizer

LABELS = ("Yes", "No")
CONTINUOUS = "transformers, continuous batching"

logging.set_verbosity_error()
logging.disable_progress_bar()
getLogger("lm_eval").setLevel("ERROR")
getLogger("ContinuousBatchingLogger").setLevel("ERROR")


class Others:
    """The ways of others to use one network.

    Args:
        network: As transformers, or PEFT, loaded it.
        tokenizer: Of the model.
        words: Where prompts come from.
        batch: Prompts that are judged at once.
    """

    def __init__(self, network: Any, tokenizer: Tokenizer, words: Words, batch: int) -> None:
        self._network, self._words, self._batch = network, words, batch
        network.generation_config.eos_token_id = None
        definition = tokenizers.Tokenizer.from_str(tokenizer.definition)
        end = tokenizer.piece(tokenizer.eos_ids[0])
        self._tokenizer = PreTrainedTokenizerFast(tokenizer_object=definition, eos_token=end)
        self._labels = [tokenizer.encode(label, "inside")[0] for label in LABELS]

    def ways_to_generate(self, rows: int, prompt: int, tokens: int, few: int) -> dict[str, Way]:
        """Return the ways to generate `tokens` for each of `rows` prompts, and `few` by the notebook's loop."""
        return {
            "transformers": lambda: self._generate(rows, prompt, tokens),
            "the notebook's loop": lambda: self.ask(self._text(prompt), few) and few,
            "transformers, static cache + compile": lambda: self._generate(
                rows, prompt, tokens, cache_implementation="static"
            ),
            CONTINUOUS: lambda: self._continuous(rows, prompt, tokens),
        }

    def generate_by(self, rows: int, prompt: int, tokens: int, settings: dict[str, Any]) -> int:
        """Generate as plain transformers does by settings as `Sampling` names them."""
        more = {"do_sample": True, "top_k": 0} if "temperature" in settings else {}
        return self._generate(rows, prompt, tokens, **(more | settings))

    def ways_to_judge(self, items: int, prompt: int, shared: int, few: int) -> dict[str, Way]:
        """Return the ways to judge `items` prompts between two labels, and `few` by the notebook's loop."""
        ways: dict[str, Way] = {"transformers": lambda: self._judge(items, prompt, shared)}
        if shared:
            ways["transformers, prefix kept"] = lambda: self._judge_behind(items, prompt, shared)
        if self._network.device.type == "cuda":
            ways["transformers, compiled"] = lambda: self._judge(items, prompt, shared, self._compiled())
        return ways | {
            "lm-evaluation-harness": lambda: self._harness(items, prompt, shared),
            "CAPPr": lambda: self._cappr(items, prompt, shared),
            "the notebook's loop": lambda: sum(self.weigh(self._text(prompt)) >= 0 for _ in range(few)),
        }

    def release(self) -> None:
        """Give back what ways keep from call to call, compiled code too: it is made anew for another number of rows."""
        torch.compiler.reset()
        if hasattr(self._network, "destroy_cached_continuous_batching_manager"):
            self._network.destroy_cached_continuous_batching_manager()

    def ask(self, prompt: str, tokens: int) -> str:
        """Generate as the notebook does: one question, sampled, decoded."""
        ids = self._tokenizer(prompt, return_tensors="pt")["input_ids"].to(self._network.device)
        settings = GenerationConfig(do_sample=True)
        output = self._network.generate(
            input_ids=ids, generation_config=settings, return_dict_in_generate=False, max_new_tokens=tokens
        )
        assert output.shape[1] == ids.shape[1] + tokens, "the end of text is switched off"
        answer: str = self._tokenizer.decode(output[0][ids.shape[1] :])
        return answer or " "

    def weigh(self, prompt: str) -> float:
        """Judge as the notebook does: all logits of one question, the last row to the CPU, and a softmax there."""
        ids = self._tokenizer(prompt, return_tensors="pt")["input_ids"].to(self._network.device)
        with torch.no_grad():  # the notebook forgets this, which costs it memory and little time
            logits = self._network.forward(input_ids=ids).logits[0, -1, :].cpu().float().numpy()
        shares = numpy.exp(logits - logits.max())
        yes, no = (float(share) for share in (shares / shares.sum())[self._labels])
        return yes / max(yes + no, 1e-30)

    def alpaca(self, instruction: str) -> str:
        """Write the notebook's prompt around an instruction."""
        return ALPACA.format(instruction=instruction)

    def _text(self, prompt: int) -> str:
        return self._words.text(self._words.draw(1, prompt)[0])

    def _tensor(self, prompts: list[tuple[int, ...]]) -> torch.Tensor:
        return torch.tensor(prompts, device=self._network.device)

    def _generate(self, rows: int, prompt: int, tokens: int, **more: Any) -> int:
        ids = self._tensor(self._words.draw(rows, prompt))
        with torch.inference_mode():
            output = self._network.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **({"do_sample": False} | more)
            )
        return (output.shape[1] - prompt) * rows

    def _continuous(self, rows: int, prompt: int, tokens: int) -> int:
        if not hasattr(self._network, "generate_batch"):
            raise Left("this network has no generate_batch")
        settings = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=-1)
        # it would ask a hub for a flash kernel where no package brings one
        flash = any(map(find_spec, ("flash_attn", "flash_attn_interface")))
        share = None if self._network.device.type == "cuda" else 0.2  # of main memory, which others use, too
        found = self._network.generate_batch(
            [list(each) for each in self._words.draw(rows, prompt)],
            generation_config=settings,
            continuous_batching_config=ContinuousBatchingConfig(auto_switch_to_flash=flash, max_memory_percent=share),
            max_new_tokens=tokens,
            persistent_manager=True,
        )
        done = sum(len(row.generated_tokens) for row in found.values())
        if done < rows * tokens:
            raise RuntimeError(f"{done} of {rows * tokens} tokens came out; its log says why")
        return done

    def _batches(self, items: int, prompt: int, shared: int) -> list[list[tuple[int, ...]]]:
        prompts = self._words.draw(items, prompt, shared)
        return [prompts[first : first + self._batch] for first in range(0, items, self._batch)]

    def _judge(self, items: int, prompt: int, shared: int, forward: Callable[..., Any] | None = None) -> int:
        with torch.inference_mode():
            for batch in self._batches(items, prompt, shared):
                self._shares((forward or self._network)(self._tensor(batch), logits_to_keep=1).logits)
        return items

    def _compiled(self) -> Callable[..., Any]:
        if not hasattr(self, "_forward"):
            self._forward = torch.compile(self._network.forward)
        return self._forward

    def _judge_behind(self, items: int, prompt: int, shared: int) -> int:
        """Compute what all prompts begin with once, and the rest of a batch behind it."""
        batches = self._batches(items, prompt, shared)
        with torch.inference_mode():
            for batch in batches:
                cache = DynamicCache(config=self._network.config)
                self._network(self._tensor([batch[0][:shared]]), past_key_values=cache, logits_to_keep=1)
                cache.batch_repeat_interleave(len(batch))
                rest = self._tensor([each[shared:] for each in batch])
                self._shares(self._network(rest, past_key_values=cache, logits_to_keep=1).logits)
        return items

    def _shares(self, logits: torch.Tensor) -> list[list[float]]:
        found: list[list[float]] = logits[:, -1].float().log_softmax(-1)[:, self._labels].tolist()
        return found

    def _harness(self, items: int, prompt: int, shared: int) -> int:
        try:
            from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
        except ImportError as error:
            raise Left(f"lm_eval cannot be imported ({error})") from error
        model = HFLM(pretrained=self._network, backend="causal", tokenizer=self._tokenizer, batch_size=self._batch)
        asked = [
            (("", ""), list(each), [label])
            for each in self._words.draw(items, prompt, shared)
            for label in self._labels
        ]
        return len(model._loglikelihood_tokens(asked, disable_tqdm=True)) // len(self._labels)

    def _cappr(self, items: int, prompt: int, shared: int) -> int:
        # a prefix is given by itself; CAPPr puts a space behind it
        prompts = [self._words.text(each) for each in self._words.draw(items, prompt - shared)]
        head = self._words.text(self._words.draw(1, shared)[0]) if shared else ""
        return len(cappr_table(self._network, self._tokenizer, prompts, LABELS, self._batch, head))


def cappr_table(
    network: Any, tokenizer: Any, prompts: list[str], labels: tuple[str, ...], batch: int, prefix: str = ""
) -> Any:
    """Let CAPPr find the log-probabilities of labels after prompts, with a prefix in its cache if there is one.

    Raises:
        Left: If it is not installed.
    """
    try:
        from peers import bring_back

        bring_back()
        from cappr.huggingface import classify  # type: ignore[import-not-found]
    except ImportError as error:
        raise Left(f"cappr 0.9.6 cannot be imported ({error})") from error

    def read(model: Any) -> Any:
        return classify.log_probs_conditional(prompts, labels, model, batch_size=batch, show_progress_bar=False)

    if not prefix:
        return read((network, tokenizer))
    cached: AbstractContextManager[Any] = classify.cache((network, tokenizer), prefix)
    with cached as model:
        return read(model)
