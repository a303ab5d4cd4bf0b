"""Every setting of a run: the commented defaults, the presets, and the checks.

A config file in `configs/` starts from `default()`, changes what its recipe needs and returns the
`ConfigDict`; single fields are overridden on the command line (`--config.rounds=2`). `validate`
runs before anything is loaded; `config_fit` asks more when the model's shape is known. The
defaults are the recipe of Qwen3-4B on Frozen Lake (spec 2.1).
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from oel_jax.config import negative_control
from oel_jax.config.choices import chosen_loss, nonsense, unused
from oel_jax.config.rules import AUTO, HELD_OUT_BOARDS, rules
from oel_jax.data import knowledge, prompts
from oel_jax.errors import UserError

# Most turns of a game: games.MAX_TURNS, which is out of reach here because the server side, which
# never imports a game, reads this module.
MAX_TURNS = 5
PAPER_GAMES = ("frozen_lake", "sokoban")

# Deploy seeds of two rounds are 10,000 games apart (spec 3.2).
GAMES_PER_ROUND = 10_000

# Slots by default, and where 'auto' cannot tell or at most.
AUTO_SLOTS = 64
_MAY_BE_AUTO = ("mesh.fsdp", "mesh.tp", "sampler.slots")

# Row 7 of spec section 12: the wording of Figs. 11 and 10, where it differs from the released one.
_PAPER_WORDING = {
    "v3": ("(the game environment (input)", "(previous experience, the game environment (input)"),
    "v4": ("history and the previous experience, generate", "history, generate"),
}


def _or_auto(number: int) -> ml_collections.FieldReference:
    """A field that takes integers and 'auto', in a config file and on the command line."""
    return ml_collections.FieldReference(number, field_type=object)


def default() -> ml_collections.ConfigDict:
    """All fields with their defaults; what a plain run does where paper and code differ."""
    c = ml_collections.ConfigDict()
    c.seed = 0  # loop seed: every random key of the run derives from it
    c.rounds = 2  # rounds of deploy, extract, consolidate, evaluate; may be raised later
    c.preset = "default"  # which of PRESETS this config started from; set by apply_preset
    # a directory, or a bucket (gs://, s3://, az://) if the package that JAX needs for it is there
    c.compilation_cache = ""  # XLA's compiled programs; '' = ~/.cache/oel_jax/xla, 'off' = none
    c.profile = ""  # 'step:10..12' traces these optimizer steps for TensorBoard's profiler
    c.negative_control = "none"  # breaks the method on purpose, see config/negative_control.py

    c.model = m = ml_collections.ConfigDict()
    m.path = "Qwen/Qwen3-4B"  # 'nano', 'nano:tiny' (bundled), a directory, or a hub id
    m.dtype = "bfloat16"  # compute dtype of student, teacher and sampler; masters are float32
    m.thinking = True  # thinking flag of the chat template, in play and in extraction
    m.attention_block = 256  # queries in a tile of attention: memory against speed
    m.check_weights = True  # refuse weights that are NaN or infinite, naming the tensor

    c.mesh = ml_collections.ConfigDict()
    # Both may be 'auto': what the planner finds quickest (oel_jax/plan/auto.py).
    c.mesh.fsdp = _or_auto(1)  # devices that split parameters and batch; -1 = all that tp leaves
    c.mesh.tp = _or_auto(1)  # devices that split heads, MLP width and vocabulary

    c.game = ml_collections.ConfigDict()
    c.game.name = "frozen_lake"  # 'frozen_lake', 'sokoban', or a game that you registered
    c.game.module = ""  # Python file that registers a game of one's own; '' = none
    c.game.max_turns = MAX_TURNS  # most turns of a game; only a game of one's own has others
    c.game.wrapper = "grid"  # first line of play prompts: 'grid' (paper), or 'plain' without a grid
    c.game.layout = "released"  # prompt layout: 'released' (with its quirks) or 'paper'

    c.sampler = s = ml_collections.ConfigDict()
    s.slots = _or_auto(AUTO_SLOTS)  # sequences generated at once; 'auto' as for the mesh
    s.max_len = 0  # cache length per slot in tokens; 0 = what the stage's budgets need
    s.decode_steps = 32  # tokens decoded per dispatch; speed only
    s.prefill_rows = 8  # prompts encoded per dispatch; speed only
    # 'split' as they are trained: gathered for every token; 'whole' on each device of mesh.fsdp
    s.weights = "split"  # 'whole' is faster on several devices, where it fits beside the student
    s.overlap = True  # games are stepped while others decode; speed only
    s.prefill_chunk = 512  # longer prompts are encoded in pieces of so many tokens; memory only
    s.max_prompt = 2560  # play prompt without knowledge, in tokens: 512 per turn (spec 4.5)
    s.max_response = 1024  # tokens of one response in a game

    c.deploy = ml_collections.ConfigDict()
    c.deploy.games_per_step = 64  # games whose prefixes make one optimizer step
    c.deploy.temperature = 0.7  # of the deployed games
    c.deploy.top_p = 1.0  # 1 = off
    c.deploy.top_k = 0  # 0 = off

    c.extract = e = ml_collections.ConfigDict()
    e.chains = 10  # K: knowledge texts, one per chain of accumulation
    e.n = 25  # the text after this many trajectories is the one that is used
    e.n_run = 25  # trajectories per chain; beyond n (released: 2n) they only lengthen the curve
    e.version = "v4"  # 'v3' = unstructured text, 'v4' = items
    e.previous = True  # the extractor sees the knowledge gathered so far
    e.l_max = 8192  # longest knowledge text and the extractor's budget, in tokens
    e.max_prompt = 0  # longest extractor prompt in tokens; 0 = formula of spec 4.5
    e.temperature = 0.7  # of the extraction games and of the extractor
    e.top_p = 0.8  # 1 = off
    e.top_k = 20  # 0 = off
    e.trajectories = "per_chain"  # 'per_chain': each chain plays its own games; 'shared': one set
    e.outcome = "full"  # shown to the extractor: 'full', 'text_only' (no result line), 'none'
    # 'text' = plain characters, as in all text from outside; 'tokens' = control tokens (released)
    e.history_markers = "text"  # the player's <think> and </think> in games the extractor reads
    e.item_marker = knowledge.MARKER  # what begins an item (v4)
    e.template_file = ""  # '' = released template, 'paper' = Figs. 10 and 11, or a text file
    e.unfinished_thought = "drop"  # thought that fills the budget: 'drop' it or 'keep' it as text
    e.truncate = "tail"  # beyond l_max keep the newest lines ('tail') or the oldest ('head')
    e.draft_tokens = 0  # tokens drafted from the prompt's own text and verified in each pass
    e.model_path = ""  # extractor model; '' = the policy of the round
    # 'raw': whole games in its place, the newest that fit into l_max; 'none': empty (control);
    # 'own_game': no texts, the teacher reads the game that a prefix is from, to its end
    e.experience = "knowledge"  # what the K texts are
    e.knowledge_from = ""  # workdir of another run whose texts of the same round are used instead
    e.deduplicate = False  # leave out items that the chain's text already has
    e.no_op = False  # tell the extractor how to say that a game teaches nothing new

    c.preflight = p = ml_collections.ConfigDict()  # does knowledge help? before consolidation
    p.games = 16  # boards with each text and without, which are won or lost; 0 = no pre-flight
    p.on_harm = "warn"  # 'stop': end the run if the gain is surely below least_gain
    p.least_gain = 0.0  # mean gain in pass rate that the texts should bring

    c.consolidate = t = ml_collections.ConfigDict()
    t.mode = "on_policy"  # or baselines: 'off_policy' (the teacher's games), 'sft' (their text)
    t.steps = 20  # S: optimizer steps per round
    t.learning_rate = 1e-6  # constant, no warm-up
    t.b1 = 0.9  # AdamW, decay of the first moment
    t.b2 = 0.999  # AdamW, decay of the second moment
    t.eps = 1e-8  # AdamW, added to the root of the second moment
    t.weight_decay = 0.01  # on all parameters
    t.clip_norm = 1.0  # global gradient norm
    t.token_budget = 20_480  # prompt and response tokens per micro-batch; not part of the result
    t.temperature = 0.7  # of the student's responses (top_p 1, top_k off)
    t.save_every = 2  # optimizer steps between checkpoints inside a round
    t.save_minutes = 10.0  # and at most so many minutes between them; 0 = only steps count
    t.keep_fp32_master = False  # hand float32 weights to the next round (a labelled deviation)
    t.drop_remainder = 0  # W: drop the last N mod W prefixes of a step; 0 or 1 = drop nothing
    t.remat = "layer"  # kept for the backward pass: 'none' = all, 'products', 'layer' = least
    t.knowledge_rng = "released"  # which text a prefix gets: random.Random(step + 1000 * round)
    t.moments_dtype = "float32"  # both of AdamW's moments: 'float32' or 'bfloat16'
    t.teacher_dtype = ""  # of the teacher's weights and logits; '' = model.dtype
    t.offload = "none"  # wait in host memory: some of 'optimizer,masters,teacher'
    # Against collapse over many rounds; all off in the paper.
    t.turn_fraction = 1.0  # learn from this share of turns: those where knowledge moves most
    t.turn_floor = 0.0  # and only from turns where it moves the teacher by this (JSD, nats)
    t.retention = "none"  # KL to the frozen teacher: 'plain' = both without knowledge, 'knowledge'
    t.retention_weight = 0.1  # factor of that term
    t.teacher = "frozen"  # 'ema' follows the student; 'trust_region' = a mixture with its logits
    t.teacher_rate = 0.05  # of the average per step, or the student's share in the mixture

    c.lora = ml_collections.ConfigDict()  # train a low-rank adapter, see oel_jax/distill/lora.py
    c.lora.rank = 0  # of the adapter; 0 = all weights are trained, as in the paper
    c.lora.alpha = 16.0  # the adapter's product is multiplied by alpha / rank
    c.lora.targets = "q,k,v,o,gate,up,down"  # weights that get an adapter, in every layer

    c.guard = ml_collections.ConfigDict()  # what stops a round and keeps its last good checkpoint
    c.guard.response_tokens = ()  # (low, high) as factors of the run's first step; () = no guard
    c.guard.entropy = ()  # the same for the student's entropy per token
    c.guard.skill_drop = 0.0  # skill (evaluate.skills) may fall by this since the start; 0 = off

    c.loss = ml_collections.ConfigDict()
    c.loss.top_k = 256  # tokens of the support: the likeliest
    c.loss.temperature = 0.7  # of both softmaxes
    # '' = what consolidate.mode trains with: 'on_policy' 'reverse' = KL(student || teacher) on the
    # student's top k, 'off_policy' 'forward' on the teacher's; 'sft' takes '' alone
    c.loss.divergence = ""  # 'reverse', 'forward', 'jsd' or ''
    c.loss.support = ""  # whose top k: 'student', 'teacher', 'union', the 'full' vocabulary, or ''
    c.loss.correction = "none"  # mass outside: 'none' leaves it out, 'renorm', 'tail' = one entry
    # 'seq_mean' (paper), 'micro_token_mean' (released: a mean in each micro-batch of each of
    # drop_remainder GPUs, weighted by samples); 'trajectory_mean': a game, then all games
    c.loss.aggregation = "token_mean"  # mean over all response tokens of a step
    c.loss.chunk = 512  # response tokens whose logits exist at a time, of all devices together

    c.evaluate = v = ml_collections.ConfigDict()
    v.maps = HELD_OUT_BOARDS  # held-out boards, from the first of the 128
    v.seeds = 10  # games per board
    v.temperature = 0.7  # of the evaluation games
    v.top_p = 0.8  # 1 = off
    v.top_k = 20  # 0 = off
    v.seed_mode = "independent"  # key per game; 'constant' = one noise stream per seed (released)
    v.unseen_split = True  # second pass rate over boards never met in deployment
    v.in_context = True  # also measure the policy with the round's knowledge in its prompt
    v.skills = False  # nano models: skills that OEL never trains, of start and consolidated policy
    v.steps = ()  # optimizer steps inside a round after which the policy is kept and measured too
    v.curve = ()  # trajectories after which knowledge is measured in context, e.g. (1, 5, 25)

    c.log = ml_collections.ConfigDict()
    c.log.tensorboard = True  # write event files beside metrics.jsonl
    c.log.console_every = 5.0  # seconds between progress lines
    return c


def auto_fields(config: ml_collections.ConfigDict) -> list[str]:
    """Fields that are 'auto': not decided yet."""
    return [path for path in _MAY_BE_AUTO if leaves(config.to_dict())[path] == AUTO]


def with_fields(
    config: ml_collections.ConfigDict, values: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """A copy with these values; paths are dotted."""
    config = config.copy_and_resolve_references()
    with config.ignore_type():
        config.update_from_flattened_dict(dict(values))
    return config


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as plain JSON types (tuples become lists), for `config.json`."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(config.to_dict())


# --- budgets (spec 4.5) ---------------------------------------------------------------------------


def play_budget(config: ml_collections.ConfigDict, with_knowledge: bool) -> tuple[int, int]:
    """(longest prompt, longest response) of a game turn in tokens, with or without knowledge."""
    extra = config.extract.l_max if with_knowledge else 0
    return config.sampler.max_prompt + extra, config.sampler.max_response


def has_extractor(config: ml_collections.ConfigDict) -> bool:
    """Whether a model writes the round's texts; otherwise they are filled in without one."""
    return config.extract.experience == "knowledge" and not config.extract.knowledge_from


def extractor_budget(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """(longest prompt, longest response) of an extractor call in tokens.

    Formula: (max_response + 512) per turn, 1024 for the template, and l_max when the previous
    knowledge is shown. The response may be l_max long, thinking included.
    """
    e = config.extract
    history = (config.sampler.max_response + 512) * config.game.max_turns + 1024
    return e.max_prompt or history + (e.l_max if e.previous else 0), e.l_max


def chain_seeds(config: ml_collections.ConfigDict) -> list[int]:
    """Seeds of the K chains: 50, 100, ... (spec 2.3)."""
    return [50 * (k + 1) for k in range(config.extract.chains)]


def extraction_template(config: ml_collections.ConfigDict) -> str | None:
    """The extraction template with this config's item marker and, with `extract.no_op`, how to say
    that there is nothing new; None = the built-in one as it is.

    Raises:
      UserError: `extract.template_file` cannot be read, or lacks one of the two slots.
    """
    e = config.extract
    if e.template_file not in ("", "paper"):
        text = prompts.load_template(e.template_file)
    else:
        text = {"v3": prompts.GAME_V3, "v4": prompts.GAME_V4}[e.version]
        if e.template_file == "paper":
            text = text.replace(*_PAPER_WORDING[e.version])
        elif e.item_marker == knowledge.MARKER and not e.no_op:
            return None
    text = text.replace(knowledge.MARKER, e.item_marker)
    return f"{text.rstrip()}\n\n{knowledge.NO_OP_SENTENCE}\n" if e.no_op else text


# --- checks ---------------------------------------------------------------------------------------


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value of every field of a nested dict."""
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{path}.{key}" if path else str(key))
    return found


def check_field(path: str) -> None:
    """UserError with the nearest name if there is no config field `path`, e.g. 'loss.top_k'."""
    table = rules()
    if path not in table:
        close = difflib.get_close_matches(path, table, n=1)
        hint = f"; did you mean config.{close[0]}?" if close else "; see oel_jax/config/defaults.py"
        raise UserError(f"config.{path} is not a field{hint}")


def refuse(path: str, value: Any, must: str) -> None:
    """Say which field is wrong and what it must be."""
    raise UserError(f"config.{path} is {value!r}; it must be {must}")


def validate(config: ml_collections.ConfigDict, games: Sequence[str] = PAPER_GAMES) -> list[str]:
    """Check every field and how fields fit together; touches no model and no device.

    Args:
      config: what a config file returned, after command-line overrides.
      games: names that `config.game.name` may have (the registered games).

    Returns:
      Remarks for the user: legal settings that are probably not what one wants.

    Raises:
      UserError: the first wrong, missing or unknown field, with its path, value and the fix.
    """
    fields, table = leaves(config.to_dict()), rules()
    for path in fields:
        check_field(path)
    for path, rule in table.items():
        if path not in fields:
            raise UserError(
                f"config.{path} is missing; start from oel_jax.config.defaults.default()"
            )
        must = rule(fields[path])
        if must:
            refuse(path, fields[path], must)
    if config.game.name not in games:
        refuse(
            "game.name",
            config.game.name,
            f"one of {', '.join(games)}; a game of your own is added with --game_module=FILE.py "
            "(config.game.module)",
        )
    if config.game.name in PAPER_GAMES and config.game.max_turns != MAX_TURNS:
        refuse("game.max_turns", config.game.max_turns, f"{MAX_TURNS} for {config.game.name}")
    _check_combinations(config)
    extraction_template(config)
    return _remarks(config)


def _check_own_game(config: ml_collections.ConfigDict) -> None:
    """There are no texts to play with, only what the teacher reads beside each prefix."""
    with_it = "with config.extract.experience='own_game', whose context belongs to single prefixes"
    if config.consolidate.mode != "on_policy":
        refuse("consolidate.mode", config.consolidate.mode, f"'on_policy' {with_it}")
    if config.negative_control != "none":
        refuse("negative_control", config.negative_control, f"'none' {with_it}")
    if config.evaluate.curve:
        refuse("evaluate.curve", config.evaluate.curve, f"() {with_it}")
    if config.evaluate.in_context:
        refuse("evaluate.in_context", True, f"False {with_it}")


def _check_combinations(config: ml_collections.ConfigDict) -> None:
    e, s, t = config.extract, config.sampler, config.consolidate
    control, game = config.negative_control, config.game.name
    if control == "foreign_extraction" and game not in negative_control.OTHER_GAME:
        refuse("negative_control", control, f"another one, since {game!r} has no other game")
    _check_loss(config)
    if e.experience != "knowledge" and (e.model_path or e.knowledge_from):
        unused = "model_path" if e.model_path else "knowledge_from"
        refuse(
            f"extract.{unused}", e[unused], f"'' with config.extract.experience={e.experience!r}"
        )
    if e.experience == "own_game":
        _check_own_game(config)
    if e.no_op and not e.previous:
        refuse(
            "extract.no_op",
            e.no_op,
            "False with config.extract.previous=False, since an extractor that does not see the "
            "previous knowledge cannot tell what is new",
        )
    if e.knowledge_from and e.model_path:
        refuse("extract.model_path", e.model_path, "'' with config.extract.knowledge_from")
    _check_stability(config)
    _check_lora(config)
    if e.n > e.n_run:
        refuse("extract.n", e.n, f"at most config.extract.n_run = {e.n_run}")
    if config.evaluate.curve and config.evaluate.curve[-1] > e.n_run:
        refuse("evaluate.curve", config.evaluate.curve, f"within config.extract.n_run = {e.n_run}")
    longest = s.max_prompt + s.max_response
    if t.token_budget < longest:
        refuse(
            "consolidate.token_budget",
            t.token_budget,
            f"at least {longest}, the longest student sequence "
            f"(sampler.max_prompt {s.max_prompt} + sampler.max_response {s.max_response})",
        )
    if has_extractor(config) and e.previous and 0 < e.max_prompt <= e.l_max:
        refuse(
            "extract.max_prompt",
            e.max_prompt,
            f"0 or above config.extract.l_max = {e.l_max}, since the extractor's prompt holds the "
            "previous knowledge (config.extract.previous)",
        )
    if 0 < s.max_len <= max(s.max_response, e.l_max):
        refuse(
            "sampler.max_len",
            s.max_len,
            f"0 or above {max(s.max_response, e.l_max)}, the longest response; otherwise no prompt "
            "fits into the cache",
        )


def _check_loss(config: ml_collections.ConfigDict) -> None:
    """The loss must be one that trains what it says, and use what is set."""
    mode, loss = config.consolidate.mode, chosen_loss(config)
    field = unused(config)
    if field:
        refuse(
            f"loss.{field}",
            config.loss[field],
            f"{default().loss[field]!r} with config.consolidate.mode={mode!r}, whose loss is minus "
            "the log-probability of each answer's own tokens",
        )
    wrong = nonsense(*loss, config.loss.top_k)
    if wrong:
        raise UserError(
            f"config.loss.divergence={loss.divergence!r}, loss.support={loss.support!r} and "
            f"loss.correction={loss.correction!r} do not go together: {wrong} ('' stands for what "
            f"config.consolidate.mode={mode!r} trains with)"
        )
    if config.negative_control == "foreign_top_k" and (mode == "sft" or loss.support == "full"):
        refuse(
            "negative_control",
            config.negative_control,
            f"another one with config.consolidate.mode={mode!r} and config.loss.support="
            f"{loss.support!r}, whose loss chooses no top k",
        )
    if config.loss.aggregation == "micro_token_mean" and not config.consolidate.drop_remainder:
        refuse(
            "consolidate.drop_remainder",
            0,
            "the number of GPUs whose micro-batches are reproduced (16 in the released scripts) "
            "with config.loss.aggregation='micro_token_mean'; or use "
            "config.loss.aggregation='token_mean'",
        )


def _check_stability(config: ml_collections.ConfigDict) -> None:
    """What keeps a run stable must fit the rest."""
    t, v = config.consolidate, config.evaluate
    if t.retention != "none" and t.teacher == "ema":
        refuse(
            "consolidate.retention",
            t.retention,
            "'none' with config.consolidate.teacher='ema', since the frozen teacher that it holds "
            "on to is not kept; use teacher='frozen' or 'trust_region'",
        )
    if "teacher" in t.offload and t.teacher == "ema":
        why = "without 'teacher' if config.consolidate.teacher='ema', which is made anew each step"
        refuse("consolidate.offload", t.offload, why)
    if "masters" in t.offload and config.model.dtype == "float32":
        why = "without 'masters' if config.model.dtype='float32', since rollouts read them"
        refuse("consolidate.offload", t.offload, why)
    if t.mode == "sft" and t.teacher != "frozen":
        refuse("consolidate.teacher", t.teacher, "'frozen' with config.consolidate.mode='sft'")
    if config.guard.skill_drop and not v.skills:
        refuse("guard.skill_drop", config.guard.skill_drop, "0, or set config.evaluate.skills=True")
    if v.steps and v.steps[-1] >= t.steps:
        refuse("evaluate.steps", v.steps, f"below config.consolidate.steps = {t.steps}")


def _check_lora(config: ml_collections.ConfigDict) -> None:
    """With an adapter there are no masters, and the teacher is the base that it lies on."""
    t, rank = config.consolidate, config.lora.rank
    if not rank:
        return
    with_it = f"with config.lora.rank={rank}"
    if t.teacher_dtype:
        why = f"'' {with_it}, where student and teacher are one set of weights"
        refuse("consolidate.teacher_dtype", t.teacher_dtype, why)
    if t.offload not in ("none", "optimizer"):
        why = f"'none' or 'optimizer' {with_it}, where the student needs the teacher's weights"
        refuse("consolidate.offload", t.offload, why)
    if t.teacher == "ema":
        refuse(
            "consolidate.teacher",
            t.teacher,
            f"'frozen' or 'trust_region' {with_it}, whose teacher is the model without the adapter",
        )
    if t.keep_fp32_master:
        why = "False {}, which keeps no float32 weights of the model"
        refuse("consolidate.keep_fp32_master", True, why.format(with_it))
    if config.guard.skill_drop:
        why = "0 {}, since the adapter of the policy that it puts back is not kept"
        refuse("guard.skill_drop", config.guard.skill_drop, why.format(with_it))


def _remarks(config: ml_collections.ConfigDict) -> list[str]:
    remarks = []
    last = config.deploy.games_per_step * (config.consolidate.steps + 1) + config.preflight.games
    if config.rounds > 1 and last > GAMES_PER_ROUND:
        remarks.append(
            "config.deploy.games_per_step x steps, with config.preflight.games, reaches game "
            f"{last} of a round; from {GAMES_PER_ROUND} on, deploy boards of consecutive rounds "
            "repeat (spec 3.2)"
        )
    dropped, games = config.consolidate.drop_remainder, config.deploy.games_per_step
    if dropped > games:
        remarks.append(
            f"config.consolidate.drop_remainder={dropped} leaves nothing of a step that has fewer "
            f"prefixes; config.deploy.games_per_step={games} games may have no more than {games}"
        )
    return remarks
