"""The `outback` program: thin over functions that a notebook can call. Nothing heavy is imported before it is needed."""

import json as jsonlib
import os
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from schemas.errors import ConfigError, OutbackError

EXIT_FAILED, EXIT_USAGE, EXIT_REJECTED = 1, 2, 3
MAX_SEED = 2**53  # what JSON holds exactly

app = typer.Typer(
    name="outback",
    help="Raw video, images and text in; a trained Emu3 out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
show_app = typer.Typer(help="Look at tables, sets, funnels, runs, failures and lineage.", no_args_is_help=True)
app.add_typer(show_app, name="show")

LakeOption = Annotated[str, typer.Option("--lake", envvar="OUTBACK_LAKE", help="Folder of the lake, or catalog:NAME.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override one value of the recipe: path.to.key=value.")
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Exit with 3 if items were rejected.")]
RetryOption = Annotated[bool, typer.Option("--retry-failed", help="Also try again what failed for good.")]


@app.command()
def ingest(
    sources: Annotated[list[str], typer.Argument(help="Files, folders, globs, CSV/JSONL/Parquet manifests.")],
    recipe: Annotated[str, typer.Option("--recipe", help="Ingest recipe: a shipped name or a TOML file.")] = "ingest",
    overrides: SetOption = None,
    lake: LakeOption = "./lake",
    json: JsonOption = False,
    strict: StrictOption = False,
    retry_failed: RetryOption = False,
) -> None:
    """Register media and texts. The bytes stay where they are."""
    from jobs.ingest import IngestConfig, IngestReport, print_ingest
    from jobs.ingest import ingest as run
    from jobs.progress import progress
    from jobs.shipped import load_named

    options = load_named(IngestConfig, recipe, overrides or ())
    reports: list[IngestReport] = []
    try:
        with progress("ingest") as advance:
            run(
                _open(lake, must_exist=False),
                sources,
                options=options,
                on_progress=advance,
                retry_failed=retry_failed,
                on_report=reports.append,
            )
    finally:
        for report in reports:
            print_ingest(report, json)
    _exit_if(strict and reports[0].num_rejected + reports[0].num_failed > 0)


@app.command()
def scan(
    recipe: Annotated[str, typer.Option("--recipe", help="Scan recipe: a shipped name or a TOML file.")] = "scan",
    overrides: SetOption = None,
    lake: LakeOption = "./lake",
    json: JsonOption = False,
    strict: StrictOption = False,
    retry_failed: RetryOption = False,
) -> None:
    """Cut everything not yet scanned into clips and score them, by one decode per medium."""
    from jobs.scan import scan as run
    from jobs.shipped import load_named
    from pipeline.scan_medium import ScanConfig

    report = run(_open(lake), load_named(ScanConfig, recipe, overrides or ()), retry_failed=retry_failed)
    found = _found(report, "scanned") if report.num_media else "nothing to do; `outback ingest` registers media"
    _answer(report, json, f"scan {report.scan_id}: {report.num_media} media, {found}")
    _exit_if(strict and _num_rejected(report) > 0)


@app.command()
def curate(
    recipe: Annotated[
        str | None, typer.Argument(help="Curation recipe: a shipped name or a TOML file.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the set; given once.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the funnel and write nothing.")] = False,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="CLIP",
            help="Say what each rule finds of this clip, an id or the beginning of one, and write nothing; without a recipe, "
            "what those of the set --name found.",
        ),
    ] = None,
    overrides: SetOption = None,
    lake: LakeOption = "./lake",
    json: JsonOption = False,
) -> None:
    """Choose clips by thresholds, print the funnel, and name the set."""
    # Read before Arrow is loaded: memory that it frees between two columns is kept for the next, not handed back.
    os.environ.setdefault("MIMALLOC_PURGE_DELAY", "-1")
    from jobs.curate import curate as run
    from jobs.curate import leave_pandas_out, load_curate_recipe, print_curate

    leave_pandas_out()
    if explain is not None:
        from jobs.explain import explain_clip, explain_in_set, print_explanation

        if (recipe is None) == (name is None):
            raise ConfigError("--explain needs a recipe, or the --name of a set: give one of them")
        if recipe is None and overrides:
            raise ConfigError("--set changes a recipe, and that of a set stands: give the recipe and no --name")
        if recipe is None:
            told = explain_in_set(_open(lake), str(name), explain)
        else:
            told = explain_clip(_open(lake), load_curate_recipe(recipe, overrides or ()), explain)
        print_explanation(told, json)
        return
    if recipe is None:
        raise ConfigError("no recipe was given: name a shipped one, such as offline, or a TOML file")
    result = run(_open(lake), load_curate_recipe(recipe, overrides or ()), name, dry_run=dry_run)
    print_curate(result, json)


@app.command()
def caption(
    set_name: Annotated[str, typer.Argument(metavar="SET", help="A curated set.")],
    recipe: Annotated[
        str, typer.Option("--recipe", help="Caption recipe: a shipped name or a TOML file.")
    ] = "caption_provided",
    overrides: SetOption = None,
    lake: LakeOption = "./lake",
    json: JsonOption = False,
    strict: StrictOption = False,
    retry_failed: RetryOption = False,
) -> None:
    """Caption what a set holds and this captioner has not captioned: by a model, or by what came with the media."""
    from jobs.caption import caption as run
    from jobs.shipped import load_named
    from pipeline.caption_clips import CaptionRecipe

    report = run(_open(lake), set_name, load_named(CaptionRecipe, recipe, overrides or ()), retry_failed=retry_failed)
    text = f"{report.num_captioned} of {report.num_windows} windows of {report.num_clips} clips have a caption"
    text += f", {report.num_new} of them new, {report.num_failed} have none"
    _answer(report, json, f"caption {set_name} by {report.captioner_id}: {text}")
    _exit_if(strict and report.num_failed > 0)


@app.command()
def score(
    family: Annotated[
        str,
        typer.Argument(
            help="aesthetic, motion_raft, duplicate, semantic, continuity, caption, or module:name of your own; the rest: scan"
        ),
    ],
    set_name: Annotated[
        str | None,
        typer.Argument(
            metavar="[SET]", help="A curated set; left out, all clips, as continuity takes them.", show_default=False
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--for", help="Curation recipe: only clips that its other rules leave undecided are scored."),
    ] = None,
    overrides: SetOption = None,
    captioner: Annotated[str | None, typer.Option("--captioner", help="Whose captions: a beginning of an id.")] = None,
    clip: Annotated[
        str | None, typer.Option("--clip", help="Folder of an open_clip model, or hf-hub:ORG/NAME, for similarity.")
    ] = None,
    lake: LakeOption = "./lake",
    json: JsonOption = False,
    strict: StrictOption = False,
    retry_failed: RetryOption = False,
) -> None:
    """Score clips that are there by one family more, or the captions of a set, so that recipes can choose by it."""
    if family == "duplicate":
        from jobs.score_duplicates import score_duplicates
        from pipeline.fingerprint_clips import FingerprintConfig
        from schemas.recipe import overridden

        if captioner or clip or recipe:
            raise ConfigError("family duplicate: it takes no --captioner, --clip or --for")
        limits = overridden(FingerprintConfig(), tuple(overrides or ()), source="score duplicate")
        compared = score_duplicates(_open(lake), set_name, limits, retry_failed=retry_failed)
        text = f"{compared.num_clips} clips compared; fingerprints: {_found(compared, 'made')}"
        _answer(compared, json, f"score {compared.scorer_id}: {text}")
        _exit_if(strict and _num_rejected(compared) > 0)
        return
    if family == "semantic":
        from jobs.score_semantic import SemanticConfig, score_semantic
        from schemas.recipe import overridden

        if captioner or clip or recipe or retry_failed:
            raise ConfigError("family semantic: it takes no --captioner, --clip, --for or --retry-failed")
        options = overridden(SemanticConfig(), tuple(overrides or ()), source="score semantic")
        alike = score_semantic(_open(lake), set_name, options)
        text = f"{alike.num_clips} clips compared by model {alike.model_id}, {alike.num_without} have no embedding"
        _answer(alike, json, f"score {alike.scorer_id}: {text}")
        _exit_if(strict and alike.num_without > 0)
        return
    if family == "continuity":
        from jobs.score_continuity import ContinuityConfig, score_continuity
        from schemas.recipe import overridden

        if set_name or captioner or clip or recipe or retry_failed:
            raise ConfigError("family continuity: it takes no SET, --captioner, --clip, --for or --retry-failed")
        cuts = overridden(ContinuityConfig(), tuple(overrides or ()), source="score continuity")
        joined = score_continuity(_open(lake), cuts)
        text = f"{joined.num_clips} clips by model {joined.model_id}, {joined.num_without} have no embedding to compare"
        _answer(joined, json, f"score {joined.scorer_id}: {text}")
        _exit_if(strict and joined.num_without > 0)
        return
    if family == "caption":
        from jobs.score import score_captions
        from pipeline.score_captions import CaptionScoreConfig
        from schemas.recipe import overridden

        if set_name is None or recipe:
            raise ConfigError("family caption: give the SET whose captions are scored, and no --for")
        config = overridden(CaptionScoreConfig(clip=clip), tuple(overrides or ()), source="score caption")
        report = score_captions(_open(lake), set_name, captioner, config, retry_failed=retry_failed)
    else:
        from jobs.curate import load_curate_recipe
        from jobs.score_clips import score_clips

        if captioner or clip:
            raise ConfigError(f"family {family}: --captioner and --clip are options of family caption")
        report = score_clips(
            _open(lake),
            family,
            tuple(overrides or ()),
            recipe=load_curate_recipe(recipe) if recipe else None,
            set_name=set_name,
            retry_failed=retry_failed,
        )
    _answer(report, json, f"score {report.scorer_id}: {report.num_clips} clips, {_found(report, 'scored')}")
    _exit_if(strict and _num_rejected(report) > 0)


@app.command()
def tokenize(
    set_name: Annotated[str, typer.Argument(metavar="SET", help="A curated set.")],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="Checkpoint id, a beginning of one, or latest.")
    ] = "latest",
    recipe: Annotated[str, typer.Option("--recipe", help="How frames are prepared.")] = "tokenize",
    overrides: SetOption = None,
    lake: LakeOption = "./lake",
    json: JsonOption = False,
    strict: StrictOption = False,
    retry_failed: RetryOption = False,
) -> None:
    """Encode the clips of a set with a trained vision tokenizer."""
    from jobs.shipped import load_named
    from jobs.tokenize_clips import TokenizeRecipe
    from jobs.tokenize_clips import tokenize as run

    config = load_named(TokenizeRecipe, recipe, overrides or ())
    report = run(_open(lake), set_name, tokenizer, config, retry_failed=retry_failed)
    _answer(
        report,
        json,
        f"tokenize {set_name} by {report.tokenizer_id}: {report.num_clips} clips, {_found(report, 'encoded')}",
    )
    _exit_if(strict and _num_rejected(report) > 0)


@app.command()
def pack(
    sets: Annotated[list[str], typer.Argument(metavar="SET...", help="Curated sets.")],
    name: Annotated[str, typer.Option("--name", help="Name of the sequence set; given once.")],
    recipe: Annotated[str, typer.Option("--recipe", help="Pack recipe: a shipped name or a TOML file.")] = "pack",
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="tokenizer_id, if there are several.")] = None,
    conversations: Annotated[
        list[Path] | None,
        typer.Option("--conversations", help="Questions and answers about the clips, in LLaVA's layout."),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            "--like", help="Sequence set whose text tokenizer to use, to go on training a model that read it."
        ),
    ] = None,
    overrides: SetOption = None,
    lake: LakeOption = "./lake",
    strict: StrictOption = False,
    json: JsonOption = False,
) -> None:
    """Pack captioned, tokenized sets, texts and conversations into sequences."""
    from jobs.pack import PackRecipe, pack_sets
    from jobs.shipped import load_named

    chosen = load_named(PackRecipe, recipe, overrides or ())
    report = pack_sets(_open(lake), sets, chosen, name, tokenizer, conversations or (), like)
    made = "there already" if report.already_there else "packed"
    text = f"{report.num_sequences} sequences, {report.num_tokens} tokens, {report.fill_ratio:.1%} full"
    left = f"; {report.num_without_caption} clips without caption or tokens, {report.num_too_long} documents too long"
    if conversations:
        left += f", {report.num_conversations_refused} conversations refused"
    _answer(report, json, f"pack {name} ({made}): {text}{left}")
    _exit_if(strict and report.num_too_long + report.num_conversations_refused > 0)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Training recipe: a shipped name or a TOML file.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Curated set (vision tokenizer, captioner), sequence set (language model) or preference set (dpo).",
        ),
    ],
    start: Annotated[
        str | None,
        typer.Option("--from", help="Language model to begin with: a checkpoint id or its beginning, or a folder."),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out", help="Set to evaluate on: of clips, or of sequences packed --like those to learn from."
        ),
    ] = None,
    overrides: SetOption = None,
    lake: LakeOption = "./lake",
    json: JsonOption = False,
) -> None:
    """Train, or resume training, what the recipe describes on a named set."""
    from jobs.train import load_training_recipe
    from jobs.train import train as run

    report = run(_open(lake), load_training_recipe(recipe, overrides or ()), data, start, held_out)
    made = "found finished" if report.already_there else f"trained to step {report.step}"
    _answer(report, json, f"train {report.objective} on {data}: {made}, checkpoint {report.checkpoint_id}")


@app.command()
def plan(
    recipe: Annotated[
        str, typer.Argument(help="Recipe of a language model's training: a shipped name or a TOML file.")
    ],
    context_len: Annotated[
        int | None, typer.Option("--context-len", help="Tokens of a row; the most that the model takes if left out.")
    ] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="h100, h200, a100, or cpu, of which nothing is known.")] = "h100",
    document_len: Annotated[
        int | None, typer.Option("--document-len", help="Tokens of a document; one fills a row if left out.")
    ] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Say what memory and time a training needs, before anything starts; exit with 2 if it cannot fit."""
    from jobs.plan import plan_training, print_plan
    from jobs.train import load_training_recipe

    made = plan_training(load_training_recipe(recipe, overrides or ()), gpu, context_len, document_len)
    print_plan(made, json)
    made.check()


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw.")],
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="Checkpoint id, a beginning of one, or latest.")
    ] = "latest",
    recipe: Annotated[str, typer.Option("--recipe", help="Size and sampling.")] = "generate",
    video: Annotated[bool, typer.Option("--video", help="Draw a video instead of an image.")] = False,
    continue_clip: Annotated[str | None, typer.Option("--continue", metavar="CLIP", help="Continue this clip.")] = None,
    context: Annotated[int, typer.Option("--context", help="Latent frames of the clip to give.")] = 1,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of the first prompt; the next ones count up.")
    ] = 0,
    preview: Annotated[
        Path | None,
        typer.Option("--preview", help="Folder for pictures of what is drawn so far, renewed as rows come."),
    ] = None,
    overrides: SetOption = None,
    lake: LakeOption = "./lake",
    json: JsonOption = False,
) -> None:
    """Draw images or short videos from text, or continue a clip."""
    from jobs.generate import Ask, GenerateRecipe
    from jobs.generate import generate as run
    from jobs.shipped import load_named

    given = context if continue_clip else 0
    kind: Any = "video" if video or continue_clip else "image"
    asks = [Ask(prompt, kind, seed + index, continue_clip, given) for index, prompt in enumerate(prompts)]
    how = load_named(GenerateRecipe, recipe, overrides or ())
    drawn = run(_open(lake), asks, checkpoint, how, preview=preview)
    rows = [
        {"generation_id": g.generation_id, "prompt": g.ask.prompt, "seed": g.ask.seed, "path": str(g.path)}
        for g in drawn
    ]
    _answer(rows, json, "\n".join(f"{row['generation_id']}  {row['path']}  {row['prompt']}" for row in rows))


@app.command()
def ask(
    question: Annotated[str | None, typer.Argument(help="What to ask; left out, the clip is described.")] = None,
    clips: Annotated[
        list[str] | None, typer.Option("--clip", metavar="CLIP", help="A clip that is shown; several, in order.")
    ] = None,
    each_of: Annotated[
        str | None, typer.Option("--each", metavar="SET", help="Ask about each clip of this set, one by one.")
    ] = None,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="Checkpoint id, a beginning of one, or latest.")
    ] = "latest",
    recipe: Annotated[str, typer.Option("--recipe", help="Sampling, and how many at once.")] = "ask",
    seed: Annotated[int, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of every answer.")] = 0,
    overrides: SetOption = None,
    lake: LakeOption = "./lake",
    json: JsonOption = False,
) -> None:
    """Ask a language model about clips, or anything; or have it describe one."""
    from jobs.ask import AskRecipe, Question
    from jobs.ask import ask as run
    from jobs.curate import read_set
    from jobs.shipped import load_named

    if clips and each_of:
        raise ConfigError("--clip and --each say different things: give one of them")
    opened = _open(lake)
    shown = [tuple(clips or ())]
    if each_of:
        shown = [(clip,) for clip in read_set(opened, each_of)["clip_id"].to_pylist()]
    questions = [Question(question, clip_ids, seed) for clip_ids in shown]
    replies = run(opened, questions, checkpoint, load_named(AskRecipe, recipe, overrides or ()))
    rows = [
        {"answer_id": r.answer_id, "clips": list(r.question.clip_ids), "text": r.text, "is_complete": r.is_complete}
        for r in replies
    ]
    _answer(rows, json, "\n".join(f"{'  '.join([*r.question.clip_ids, r.text])}" for r in replies))


@app.command()
def evaluate(
    data: Annotated[str, typer.Argument(help="A sequence set, such as one that is held out.")],
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="Checkpoint id, a beginning of one, or latest.")
    ] = "latest",
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="The first rows alone; left out, all.")] = None,
    at_once: Annotated[int, typer.Option("--rows-at-once", min=1, help="What memory holds.")] = 8,
    lake: LakeOption = "./lake",
    json: JsonOption = False,
) -> None:
    """The loss of a language model on a sequence set, by kind of token and place in the document, without training it."""
    from jobs.evaluate import EvaluateRecipe
    from jobs.evaluate import evaluate as run

    report = run(_open(lake), checkpoint, data, EvaluateRecipe(rows=rows, rows_at_once=at_once))
    _answer(report, json, "\n".join(f"{name:>10}  {value:.4f} nats a token" for name, value in report.figures.items()))


@app.command()
def prefer(
    name: Annotated[str, typer.Option("--name", help="Name of the preference set; given once.")],
    votes: Annotated[
        list[Path] | None, typer.Option("--votes", help="CSV, JSONL or Parquet of generation_id, voter, score.")
    ] = None,
    scorer: Annotated[
        str | None, typer.Option("--scorer", help="shapes, or module:function of the prompt and the frames.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option("--checkpoint", help="Whose generations to look at; left out, everybody's.")
    ] = None,
    generation: Annotated[
        list[str] | None, typer.Option("--generation", help="Which generations to look at; left out, all of them.")
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", help="Prefer recipe: a shipped name or a TOML file.")] = "prefer",
    overrides: SetOption = None,
    lake: LakeOption = "./lake",
    json: JsonOption = False,
    strict: StrictOption = False,
) -> None:
    """Pair the best and the worst generation of each prompt, by votes or by a scorer, and name the pairs."""
    from jobs.prefer import PreferRecipe
    from jobs.prefer import prefer as run
    from jobs.shipped import load_named

    how = load_named(PreferRecipe, recipe, overrides or ())
    whose = {"checkpoints": checkpoint or (), "generations": generation or ()}
    report = run(_open(lake), name, how, votes=votes or (), scorer=scorer, **whose)
    made = "there already" if report.already_there else "made"
    text = f"{report.num_pairs} pairs of {report.num_generations} generations"
    left = (
        f"; {report.num_alone} generations have no other of their prompt and size, {report.num_refused} items refused"
    )
    _answer(report, json, f"prefer {name} by {report.judge} ({made}): {text}{left}")
    _exit_if(strict and report.num_refused > 0)


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="Language model checkpoint: id, a beginning of one, or latest; or the id of a training that is not finished."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    form: Annotated[
        str,
        typer.Option(
            "--form",
            help="llama (for vLLM), transformers, official, adapter, or outback, for `train --from`.",
            case_sensitive=False,
        ),
    ] = "llama",
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="Of a training; left out, the newest that is written.")
    ] = None,
    lake: LakeOption = "./lake",
    json: JsonOption = False,
) -> None:
    """Write a model as folders that vLLM, transformers or Emu3's own code load, while it is trained or afterwards."""
    from jobs.export import export as run
    from jobs.export import form_named

    report = run(_open(lake), model, folder, form_named(form), step)
    text = f"export {report.checkpoint_id} of step {report.step} as {report.form}: {', '.join(report.folders)}"
    _answer(report, json, text)


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="SQL over the lake's tables, read-only.")],
    at: Annotated[
        str | None, typer.Option("--at", help="State to read: a set's name, a tag, a snapshot id or a time.")
    ] = None,
    lake: LakeOption = "./lake",
    json: JsonOption = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Query the tables with DuckDB, now or as they were."""
    from jobs.sql import print_sql, run_sql

    print_sql(run_sql(_open(lake), query, at), json=json, csv=csv)


@show_app.command("tables")
def show_tables(
    hashes: Annotated[bool, typer.Option("--hash", help="Add a hash of each table's content.")] = False,
    lake: LakeOption = "./lake",
    json: JsonOption = False,
) -> None:
    """Rows, files, sizes and tags of every table."""
    from jobs.show import print_tables

    print_tables(_open(lake), hashes=hashes, json=json)


@show_app.command("sets")
def show_sets(lake: LakeOption = "./lake", json: JsonOption = False) -> None:
    """Curated sets, sequence sets and preference sets by name."""
    from jobs.show import print_sets

    print_sets(_open(lake), json=json)


@show_app.command("funnel")
def show_funnel(name: str, lake: LakeOption = "./lake", json: JsonOption = False) -> None:
    """What each rule of a set rejected."""
    from jobs.show import print_funnel

    print_funnel(_open(lake), name, json=json)


@show_app.command("runs")
def show_runs(lake: LakeOption = "./lake", json: JsonOption = False) -> None:
    """Every execution: job, outcome, duration, code."""
    from jobs.show import print_runs

    print_runs(_open(lake), json=json)


@show_app.command("attempts")
def show_attempts(lake: LakeOption = "./lake", json: JsonOption = False) -> None:
    """Everything that failed, by stage and reason."""
    from jobs.show import print_attempts

    print_attempts(_open(lake), json=json)


@show_app.command("lineage")
def show_lineage(generation: str, lake: LakeOption = "./lake", json: JsonOption = False) -> None:
    """From a generation back to checkpoint, run, sequences, clips and media."""
    from jobs.show import print_lineage

    print_lineage(_open(lake), generation, json=json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    address: Annotated[str | None, typer.Option("--address", help="The cluster's dashboard address.")] = None,
    lake: LakeOption = "./lake",
    follow: Annotated[bool, typer.Option(help="Print the job's log and wait for it.")] = True,
) -> None:
    """Run an outback command as a Ray job on a cluster: outback submit -- scan."""
    from jobs.submit import submit as run

    if not context.args:
        raise ConfigError("nothing to submit; write the command after two dashes: outback submit -- scan")
    raise typer.Exit(run(context.args, address=address, lake=lake, follow=follow))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where corpus, lake and report go.")] = Path("demo"),
    seed: Annotated[int, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of the corpus.")] = 0,
    size: Annotated[
        str, typer.Option("--size", help="full, or smoke: the same road in two minutes, too short to draw well.")
    ] = "full",
    full: Annotated[
        bool, typer.Option("--full", help="Every other training after it, and what each of them brings; under an hour.")
    ] = False,
) -> None:
    """Walk the whole road on a small corpus made on the spot, and write a report."""
    from jobs.demo import demo as run

    run(folder, seed, size, full=full)


@app.command()
def doctor(lake: LakeOption = "./lake", json: JsonOption = False) -> None:
    """Say what this machine can run, and what to do about each lack."""
    from jobs.doctor import doctor as run
    from jobs.doctor import print_doctor

    raise typer.Exit(print_doctor(run(lake), json))


def main() -> None:
    """The console script. Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 3 rejected items with --strict."""
    try:
        app()
    except ConfigError as error:
        print(f"outback: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except OutbackError as error:
        print(f"outback: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except UnicodeEncodeError as error:
        print(f"outback: found {error.object!r}, which is not UTF-8", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except OSError as error:
        if os.environ.get("OUTBACK_TRACEBACK"):
            raise
        print(f"outback: {error} (OUTBACK_TRACEBACK=1 says where)", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def _open(where: str, *, must_exist: bool = True) -> Any:
    from schemas.catalog import Lake

    return Lake.open(where, must_exist=must_exist)


def _answer(value: Any, json: bool, text: str) -> None:
    if json:
        print(
            jsonlib.dumps(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value, default=str)
        )
    else:
        print(text)


def _found(report: Any, verb: str) -> str:
    """How a stage ended, with what it left alone: failures are never silent."""
    outcome = report.outcome
    found = f"{outcome.num_done} {verb}, {outcome.num_failed} failed" if outcome else "nothing to do"
    left = f"; {report.num_given_up} failed before: see `outback show attempts`, or give --retry-failed"
    return found + (left if report.num_given_up else "")


def _num_rejected(report: Any) -> int:
    return int(report.num_given_up + (report.outcome.num_failed if report.outcome else 0))


def _exit_if(rejected: bool) -> None:
    if rejected:
        raise typer.Exit(EXIT_REJECTED)


if __name__ == "__main__":
    main()
