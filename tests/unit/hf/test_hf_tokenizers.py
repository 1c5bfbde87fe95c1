"""A run with a Hugging Face tokenizer: source → batches → checkpoint → exported folder → checkpoint, one set of ids."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoProcessor

import megatron_mm.hf
from megatron_mm.config import config_from_dict, config_to_dict
from megatron_mm.data.ingest.build import build_source
from megatron_mm.data.loader import TrainingData
from megatron_mm.data.source import Source
from megatron_mm.data.tokenizer import Tokenizer, find_tokenizer, open_tokenizer
from megatron_mm.data.tokenizer.adapt import adapt_tokenizer
from megatron_mm.errors import UserError
from megatron_mm.evaluation.generate import Generator, Prompt
from megatron_mm.hf.exporter import export, export_tensors
from megatron_mm.hf.importer import check_same_model, import_hf
from megatron_mm.training.checkpoint_files import write_tensors
from tests.unit.data.hf_tokenizers import FAMILIES, write_tokenizer
from tests.unit.hf.sample import DictSource, megatron_tensors, run_config
from tests.unit.hf.test_hf_processing import picture, random_texts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Family → its tokenizer, and a model that was exported with it."""
    root = tmp_path_factory.mktemp("exported")
    run = run_config("qwen3", vocab_size=512)
    for family in FAMILIES:
        adapt_tokenizer(write_tokenizer(root / f"raw-{family}", family), root / family)
        export_tensors(DictSource(run, megatron_tensors(run)), root / family, root / f"{family}-model")
    return {family: (root / family, root / f"{family}-model") for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_training_on_any_text(folders, family):
    trained, processor = open_tokenizer(folders[family][0]), AutoProcessor.from_pretrained(folders[family][1])
    exported = processor.tokenizer
    assert type(exported).__module__.startswith("transformers.")
    assert processor.image_token_id == trained.image_id
    special = ["<|endoftext|> a", "</s><s>", "<pad> <|im_end|>", "<|begin_of_text|>"]
    for text in [*random_texts(150), *special]:
        wanted = [trained.bos_id, *trained.encode(text)]
        assert exported(text)["input_ids"] == wanted  # "<image>" in it is text here
        assert exported(text, add_special_tokens=False)["input_ids"] == wanted[1:]
        if "<image>" not in text:
            assert processor.token_ids(text) == wanted
        assert exported.decode(wanted, skip_special_tokens=True) == trained.decode(wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_token_through_the_processor(folders, family):
    trained, processor = open_tokenizer(folders[family][0]), AutoProcessor.from_pretrained(folders[family][1])
    image = [trained.image_id] * 9
    pictures = [picture(30, 20), picture(20, 30)]
    texts = ["<image> Question: </s>a?", "x<image>"]
    rows = [
        [trained.bos_id, *image, *trained.encode(" Question: </s>a?")],
        [trained.bos_id, *trained.encode("x"), *image],
    ]
    assert processor(images=pictures, text=texts)["input_ids"] == rows
    batch = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    padding = len(rows[0]) - len(rows[1])
    assert batch["input_ids"].tolist() == [rows[0], [trained.pad_id] * padding + rows[1]]
    assert batch["attention_mask"].tolist() == [[1] * len(rows[0]), [0] * padding + [1] * len(rows[1])]
    assert batch["pixel_values"].shape == (2, 3, 28, 28)
    assert processor(text="x", add_special_tokens=False)["input_ids"] == [trained.encode("x")]
    with pytest.raises(UserError, match="not an option here"):
        processor(text="x", truncation=True, max_length=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_whole_and_comes_back(folders, family, tmp_path):
    """No special id but eos is ever an answer; saving anew with transformers keeps the tokenizer's hash."""
    trained, model = open_tokenizer(folders[family][0]), folders[family][1]
    assert find_tokenizer(model) == model
    assert open_tokenizer(model).hash == trained.hash
    check_same_model(model, run_config("qwen3", vocab_size=512))
    AutoProcessor.from_pretrained(model).save_pretrained(tmp_path / "again")
    assert open_tokenizer(tmp_path / "again").hash == trained.hash
    config = json.loads((model / "generation_config.json").read_text())
    never = (trained.special_ids | set(range(trained.vocab_size, 512))) - {trained.eos_id}
    assert set(config["suppress_tokens"]) == never
    assert config["eos_token_id"] == trained.eos_id


def test_ids_without_this_package(folders):
    """Plain transformers reads the exported folder's tokenizer."""
    tokenizer, model = folders["qwen"]
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        f"print(AutoTokenizer.from_pretrained({str(model)!r})('a <image> </s>')['input_ids'])\n"
        "assert 'megatron_mm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    trained = open_tokenizer(tokenizer)
    assert json.loads(done.stdout) == [trained.bos_id, *trained.encode("a <image> </s>")]


def wanted_start(tokenizer: Tokenizer, i: int) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(f"red {i} <image> </s>")]


def test_a_run_from_source_to_answer(folders, tmp_path):
    """The ids that training sees are those of a prompt to its export."""
    tokenizer = open_tokenizer(folders["qwen"][0])
    pages = []
    for i in range(40):
        picture(30, 20, i).save(tmp_path / f"{i}.png")
        texts = [{"text": f"red {i} <image> </s>"}, {"text": " circle\n"}]
        pages.append({"content": [texts[0], {"image": f"{i}.png"}, texts[1]]})
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    build_source([tmp_path / "pages.jsonl"], tmp_path / "pages", "interleaved", tokenizer)
    source = Source(tmp_path / "pages")
    source.check_tokenizer(tokenizer)
    with pytest.raises(UserError, match="not the one that this source was made with"):
        source.check_tokenizer(open_tokenizer(folders["gpt2"][0]))
    end = [tokenizer.image_id, *tokenizer.encode(" circle\n"), tokenizer.eos_id]
    assert source.text(7).tolist() == [*wanted_start(tokenizer, 7), *end]

    fields = config_to_dict(run_config("qwen3", vocab_size=512)) | {"run_dir": str(tmp_path / "run")}
    fields["data"] |= {"tokenizer": tokenizer.path, "validation_fraction": 0.0, "num_workers": 0}
    fields["data"]["sources"][0]["path"] = str(tmp_path / "pages")
    fields["training"] |= {"global_batch_size": 1, "micro_batch_size": 1}
    run = config_from_dict(fields)
    TrainingData.prepare(run)
    data = TrainingData.open(run)
    layout = data.layout
    assert (layout.image_token_id, layout.bos_token_id) == (tokenizer.image_id, tokenizer.bos_id)
    assert (layout.eos_token_id, layout.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    trained = next(data.train_loader(0, 0, 1, None)).tokens[0].tolist()
    first = trained[: trained.index(tokenizer.image_id)]
    assert first in [wanted_start(tokenizer, i) for i in range(40)]

    checkpoint = tmp_path / "run/checkpoints/step-00000002"
    write_tensors(checkpoint, run, megatron_tensors(run), tokenizer=Path(tokenizer.path))
    assert {path.name for path in (checkpoint / "tokenizer").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert open_tokenizer(find_tokenizer(checkpoint)).hash == tokenizer.hash
    export(tmp_path / "run", tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    prompt = "red 7 </s><image> circle\n"
    expected = [tokenizer.bos_id, *tokenizer.encode("red 7 </s>"), *[tokenizer.image_id] * 9]
    assert processor.token_ids(prompt) == expected + tokenizer.encode(" circle\n")
    model = megatron_mm.hf.MegatronMMForConditionalGeneration.from_pretrained(tmp_path / "hf")
    answers = Generator(model, processor)([Prompt(prompt, (tmp_path / "7.png",))], 4, stops=("\n",))
    assert len(answers) == 1

    write_tensors(tmp_path / "back", run, import_hf(tmp_path / "hf"), tokenizer=find_tokenizer(tmp_path / "hf"))
    assert open_tokenizer(find_tokenizer(tmp_path / "back")).hash == tokenizer.hash
