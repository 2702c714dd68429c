"""Pushes to a Hub on loopback, and what comes back."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def files(hub):
    """The files at the head of a branch of a repository."""

    def find(repo, branch="main"):
        found = hub.repositories[repo]
        return found.commits[found.branches[branch]]

    return find


@pytest.fixture
def uncut(hub):
    yield
    hub.cut = None


def test_a_pushed_classifier_comes_back_to_the_bit(client, files):
    expected = client.run("pushed = make(); commit = pushed.push_to_hub('me/whole'); answer = probabilities(pushed)")
    adapters, parts = ("group_0", "print", "photo"), ("README.md", "adapter_config.json", "adapter_model.safetensors")
    inside = {f"{adapter}/{part}" for adapter in adapters for part in parts}
    assert set(files("me/whole")) == {".gitattributes", "README.md", "config.json", "tasks.json"} | inside
    client.wipe_cache()
    assert client.run("answer = probabilities(MultiTaskClassifier.from_pretrained('me/whole'))") == expected


def test_prototypes_come_back(client):
    expected = client.run(
        "from tests.conftest import make_task\n"
        "learns = [make_task('print', 3), make_task('photo', 4)]\n"
        "config = MmAPConfig(num_prompts=4, source_shape=(2, 4))\n"
        "pushed = MultiTaskClassifier(CLIPModel.from_pretrained('me/clip'), processor, learns, config).eval()\n"
        "pushed.compute_prototypes(); pushed.push_to_hub('me/routed', subfolder='inside')\n"
        "answer = pushed.predict(images).probabilities.tolist()"
    )
    client.wipe_cache()
    client.run("pulled = MultiTaskClassifier.from_pretrained('me/routed', subfolder='inside')")
    assert client.run("answer = pulled.predict(images).probabilities.tolist()") == expected


def test_a_push_is_one_commit_and_says_which(client, hub):
    found = client.run(
        "pushed = make(); commit = pushed.push_to_hub('me/once', commit_message='The first')\n"
        "answer = commit.oid, commit.commit_url"
    )
    assert hub.repositories["me/once"].messages == ["initial commit", "The first"]
    head = hub.repositories["me/once"].branches["main"]
    assert found == [head, f"{hub.url}/me/once/commit/{head}"]


def test_a_second_push_uploads_what_has_changed_only(client, hub):
    again = "pushed.push_to_hub('me/again')"
    first = client.run(f"pushed = make(); commit = {again}; answer = commit.oid")
    assert client.run(f"answer = {again}.oid") == first
    assert hub.repositories["me/again"].messages == ["initial commit", "Upload adapters"]
    client.run(
        "with torch.no_grad():\n"
        "    next(iter(pushed.adapter_parameters('print').values())).add_(1)\n"
        "pushed.push_to_hub('me/again')"
    )
    changed = {"print/adapter_model.safetensors": "lfsFile", "tasks.json": "file"}
    assert hub.repositories["me/again"].changes[-1] == changed


@pytest.mark.parametrize("subfolder", [None, "runs/one"])
def test_what_an_earlier_push_wrote_and_this_one_lacks_is_deleted(subfolder, client, hub, files):
    repo = f"me/fewer{'-inside' if subfolder else ''}"
    client.run(
        "from huggingface_hub import HfApi\n"
        "pushed = make(); pushed.set_grouping(TaskGrouping.by_mode('none', list(pushed.tasks)))\n"
        f"pushed.push_to_hub({repo!r}, subfolder={subfolder!r})\n"
        f"api = HfApi(); api.upload_file(path_or_fileobj=b'mine', path_in_repo='group_7/notes.md', repo_id={repo!r})\n"
    )
    before = set(files(repo))
    client.run("fewer = make(); expected = probabilities(fewer)")
    client.run(f"fewer.push_to_hub({repo!r}, subfolder={subfolder!r})")
    prefix = f"{subfolder}/" if subfolder else ""
    gone = {f"{prefix}group_1/{file}" for file in ("README.md", "adapter_config.json", "adapter_model.safetensors")}
    assert before - set(files(repo)) == gone
    client.wipe_cache()
    load = f"MultiTaskClassifier.from_pretrained({repo!r}, subfolder={subfolder!r})"
    assert client.run(f"answer = probabilities({load}) == expected")


def test_the_config_of_a_clip_in_the_same_repository_stays(client, files):
    client.run("CLIPModel.from_pretrained(base).push_to_hub('me/both'); processor.push_to_hub('me/both')")
    config = files("me/both")["config.json"]
    for seed in range(2):
        client.run(f"pushed = make(base='me/both', seed={seed}); pushed.push_to_hub('me/both')")
        assert files("me/both")["config.json"] == config
    expected = client.run("answer = probabilities(pushed)")
    client.wipe_cache()
    assert client.run("answer = probabilities(MultiTaskClassifier.from_pretrained('me/both'))") == expected


def test_loading_asks_for_the_file_that_counts_downloads(client):
    client.run("make().push_to_hub('me/counted')")
    client.wipe_cache()
    client.run("MultiTaskClassifier.from_pretrained('me/counted')")
    (found,) = client.cache.glob("models--me--counted/snapshots/*/config.json")
    names = {"library_name", "library_version", "tasks", "base_model"}
    assert json.loads(found.read_text()).keys() == names


def test_each_adapter_of_a_pushed_classifier_is_one_for_peft(client):
    client.wipe_cache()
    assert client.run(
        "pushed, pixels = make(), torch.randn(2, 3, 48, 48)\n"
        "pushed.push_to_hub('me/each')\n"
        "with use_routes(pushed.model, ('print',)):\n"
        "    expected = pushed.model.get_image_features(pixels).pooler_output\n"
        "clip = CLIPModel.from_pretrained('me/clip').eval()\n"
        "plain = clip.get_image_features(pixels).pooler_output\n"
        "alone = PeftModel.from_pretrained(clip, 'me/each', subfolder='print').eval()\n"
        "found = alone.get_image_features(pixels).pooler_output\n"
        "answer = torch.equal(found, expected), torch.equal(plain, expected)"
    ) == [True, False]


def test_one_adapter_that_peft_pushed_loads_by_its_name_alone(client):
    assert client.run(
        "one = get_peft_model(CLIPModel.from_pretrained('me/clip'), MmAPConfig(init_std=0.5)).eval()\n"
        "one.push_to_hub('me/one')\n"
        "inputs = {'input_ids': torch.tensor([[0, 5, 6, 1]]), 'pixel_values': torch.randn(1, 3, 48, 48)}\n"
        "answer = torch.equal(CLIPModel.from_pretrained('me/one')(**inputs).logits_per_image,"
        " one(**inputs).logits_per_image)"
    )


def test_branches_and_commits_give_their_own_weights(client, hub):
    first, second, other = client.run(
        "first, second, other = make(seed=1), make(seed=2), make(seed=3)\n"
        "one = first.push_to_hub('me/revisions').oid\n"
        "second.push_to_hub('me/revisions')\n"
        "other.push_to_hub('me/revisions', revision='trial')\n"
        "answer = [probabilities(made) for made in (first, second, other)]"
    )
    assert first != second != other
    assert set(hub.repositories["me/revisions"].branches) == {"main", "trial"}
    client.wipe_cache()
    load = "answer = probabilities(MultiTaskClassifier.from_pretrained('me/revisions', revision={}))"
    assert client.run(load.format("one")) == first
    assert client.run(load.format("None")) == second
    assert client.run(load.format("'trial'")) == other
    assert "has no revision 'tryal'" in client.fail(load.format("'tryal'"))


def test_a_subfolder_holds_a_classifier(client, files, tmp_path):
    expected = client.run(
        "pushed = make(seed=4); pushed.push_to_hub('me/many', subfolder='runs/four'); answer = probabilities(pushed)"
    )
    assert {path.split("/")[0] for path in files("me/many")} == {".gitattributes", "runs"}
    assert 'from_pretrained("me/many", subfolder="runs/four")' in files("me/many")["runs/four/README.md"].decode()
    client.wipe_cache()
    load = "answer = probabilities(MultiTaskClassifier.from_pretrained({!r}, subfolder={!r}))"
    assert client.run(load.format("me/many", "runs/four")) == expected
    client.run(f"pushed.save_pretrained({str(tmp_path / 'runs' / 'four')!r})")
    assert client.run(load.format(str(tmp_path), "runs/four")) == expected


@pytest.mark.parametrize("subfolder", ["..", "runs/../..", "/etc", "a//b", "a\\b", "*"])
def test_a_subfolder_that_leaves_the_repository_is_refused(subfolder, client, hub):
    for code in (f"from_pretrained('me/many', subfolder={subfolder!r})", f"push_to_hub('me/evil', {subfolder=})"):
        of = "MultiTaskClassifier" if code.startswith("from") else "make()"
        assert "is no folder inside a repository; write names" in client.fail(f"{of}.{code}", "ValueError")
    assert "me/evil" not in hub.repositories


def test_files_land_in_the_cache_that_is_given(client, tmp_path):
    client.run("make().push_to_hub('me/cached')")
    client.wipe_cache()
    client.run(f"MultiTaskClassifier.from_pretrained('me/cached', cache_dir={str(tmp_path)!r})")
    assert {path.name for path in tmp_path.glob("models--*")} == {"models--me--cached", "models--me--clip"}
    assert not list(client.cache.glob("models--*/snapshots"))


def test_a_private_repository_opens_to_its_owner_only(client, hub):
    expected = client.run("made = make(); made.push_to_hub('me/secret', private=True); answer = probabilities(made)")
    assert hub.repositories["me/secret"].private
    client.wipe_cache()
    load = "answer = probabilities(MultiTaskClassifier.from_pretrained('me/secret', model=base_model, token={}))"
    client.run("base_model = CLIPModel.from_pretrained('me/clip')")
    for token in ("False", "'yours'"):
        sentence = client.fail(load.format(token))
        assert "no repository 'me/secret' that you may see; correct the name, or give the token" in sentence
    assert client.run(load.format("'mine'")) == expected


def test_names_tokens_and_rights_that_are_wrong_are_told(client, hub):
    load = "MultiTaskClassifier.from_pretrained({})"
    assert "no repository 'me/nothing'" in client.fail(load.format("'me/nothing'"))
    assert "is neither a folder nor the name" in client.fail(load.format("'./no/such/folder'"), "ValueError")
    assert "holds no readable tasks.json" in client.fail(load.format("'me/clip'"), "ValueError")
    for options, sentence in {
        "'me/x', token='wrong'": "knows no account by the token",
        "'me/x', token=False": "knows no account by the token",
        "'you/x'": "does not let this token write there",
        "'me/clip', token='yours'": "does not let this token write there",
        "'me/clip', parent_commit='0000000'": "has a newer commit",
    }.items():
        assert sentence in client.fail(f"make().push_to_hub({options})")
    assert "is neither a folder nor the name" in client.fail("make().push_to_hub('me/x y')", "ValueError")
    assert "me/x" not in hub.repositories
    assert "you/x" not in hub.repositories


@pytest.mark.parametrize("kind", ["upload", "commit"])
def test_a_push_that_is_cut_leaves_everything_whole_and_can_be_done_again(kind, client, hub, files, uncut, tmp_path):
    repo, folder = f"me/cut-{kind}", str(tmp_path / "local")
    first = client.run(f"made = make(seed=5); made.push_to_hub({repo!r}); answer = probabilities(made)")
    before = dict(files(repo))
    second = client.run(f"made = make(seed=6); made.save_pretrained({folder!r}); answer = probabilities(made)")
    hub.cut = kind
    client.run("import time; sleep, time.sleep = time.sleep, lambda seconds: None")  # clients try five times more
    sentence = client.fail(f"made.push_to_hub({repo!r})")
    client.run("time.sleep = sleep")
    assert sentence.startswith("The connection to the Hub broke (")
    assert sentence.endswith(f"{repo} shows all of a push or nothing, so try again.")
    assert files(repo) == before
    hub.cut = None
    assert client.run("answer = probabilities(made)") == second
    assert client.run(f"answer = probabilities(MultiTaskClassifier.from_pretrained({folder!r}))") == second
    client.wipe_cache()
    assert client.run(f"answer = probabilities(MultiTaskClassifier.from_pretrained({repo!r}))") == first
    client.run(f"made.push_to_hub({repo!r})")
    assert client.run(f"answer = probabilities(MultiTaskClassifier.from_pretrained({repo!r}))") == second


def test_a_commit_of_somebody_else_meanwhile_is_kept(client, files):
    client.run("made = make(seed=7); seen = made.push_to_hub('me/shared').oid")
    meanwhile = client.run("newer = make(seed=8); newer.push_to_hub('me/shared'); answer = probabilities(newer)")
    before = dict(files("me/shared"))
    sentence = client.fail("make(seed=9).push_to_hub('me/shared', parent_commit=seen)")
    assert "has a newer commit of 'main' than parent_commit=" in sentence
    assert sentence.endswith("load the newer one and push again, or leave parent_commit out.")
    assert files("me/shared") == before
    assert client.run("answer = probabilities(MultiTaskClassifier.from_pretrained('me/shared'))") == meanwhile
    client.run("head = made.push_to_hub('me/shared').oid; newer.push_to_hub('me/shared', parent_commit=head)")


def test_what_is_pushed_tells_no_path_of_this_machine(client, files, clip_folder):
    expected = client.run("made = make(base=base); made.push_to_hub('me/local-base'); answer = probabilities(made)")
    for content in files("me/local-base").values():
        assert clip_folder.encode() not in content
        assert str(Path.home()).encode() + b"/" not in content
    assert json.loads(files("me/local-base")["tasks.json"])["base_model"] is None
    assert json.loads(files("me/local-base")["print/adapter_config.json"])["base_model_name_or_path"] is None
    sentence = client.fail("MultiTaskClassifier.from_pretrained('me/local-base')", "ValueError")
    assert "load that base and write from_pretrained(..., model=base)" in sentence
    load = "MultiTaskClassifier.from_pretrained('me/local-base', model=CLIPModel.from_pretrained(base))"
    assert client.run(f"answer = probabilities({load})") == expected


def test_the_trainer_pushes_the_classifier_and_its_card_and_nothing_else(client, files, hub, uncut, tmp_path):
    client.run(
        "from tests.conftest import make_task\n"
        "learns = [make_task('print', 3, dataset='me/pictograms'), make_task('photo', 4, dataset='me/pictograms')]\n"
        "config = MmAPConfig(num_prompts=4, source_shape=(2, 4))\n"
        "classifier = MultiTaskClassifier(CLIPModel.from_pretrained('me/clip'), processor, learns, config)\n"
        f"args = MultiTaskTrainingArguments({str(tmp_path / 'out')!r}, use_cpu=True, report_to='none', max_steps=4,\n"
        "    per_device_train_batch_size=6, grouping_steps=2, grouping_snapshots=1, snapshot_images=6, save_steps=2,\n"
        "    disable_tqdm=True, push_to_hub=True, hub_model_id='me/trained', hub_private_repo=True)\n"
        "trainer = MultiTaskTrainer(model=classifier, args=args)\n"
        "trainer.train(); trainer.evaluate()\n"
    )
    messages = ["initial commit", "Training in progress, step 2", "Training in progress, step 4"]
    assert hub.repositories["me/trained"].messages == messages
    accuracy, oid = client.run("answer = trainer.evaluate()['eval_mean_accuracy'], trainer.push_to_hub().oid")
    assert oid == hub.repositories["me/trained"].branches["main"]
    assert hub.repositories["me/trained"].private
    found = files("me/trained")
    folders = {path.split("/")[0] for path in found}
    groups = {folder for folder in folders if folder.startswith("group_")}
    files_of_all = {".gitattributes", "README.md", "config.json", "tasks.json", "affinity.safetensors", "grouping.png"}
    assert folders == files_of_all | {"print", "photo"} | groups
    parts = {path.split("/")[1] for path in found if "/" in path}
    assert parts == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = found["README.md"].decode()
    assert 'MultiTaskClassifier.from_pretrained("me/trained")' in card
    assert f"value: {accuracy}" in card
    assert "datasets:\n- me/pictograms\n" in card
    assert (tmp_path / "out" / "README.md").read_text() == card
    assert "More Information Needed" not in card
    client.run(f"args.push_to_hub, args.output_dir, args.hub_model_id = False, {str(tmp_path / 'later')!r}, None")
    client.run("later = MultiTaskTrainer(model=classifier, args=args); later.push_to_hub()")
    assert 'MultiTaskClassifier.from_pretrained("me/later")' in files("me/later")["README.md"].decode()
    assert set(files("me/later")) == set(found)
    client.run("args.push_to_hub, args.output_dir = True, trainer.args.output_dir")
    hub.cut = "commit"
    client.run("args.max_steps = 6; trainer.train()")  # goes on although its checkpoints cannot be pushed
    assert client.run("answer = trainer.state.global_step") == 6
    assert "The connection to the Hub broke" in client.fail("trainer.push_to_hub()")


def test_a_base_at_a_revision_comes_back(client):
    """The base's main branch has other weights by then."""
    expected = client.run(
        "made, CLIPModel_ = make(), CLIPModel.from_pretrained(base)\n"
        "CLIPModel_.push_to_hub('me/moving')\n"
        "first = processor.push_to_hub('me/moving').oid\n"
        "with torch.no_grad():\n"
        "    CLIPModel_.visual_projection.weight.mul_(-1)\n"
        "CLIPModel_.push_to_hub('me/moving')\n"
        "CLIPModel.from_pretrained('me/moving')\n"
        "clip = CLIPModel.from_pretrained('me/moving', revision=first)\n"
        "pushed = MultiTaskClassifier(clip, processor, tasks(), MmAPConfig(num_prompts=4)).eval()\n"
        "pushed.push_to_hub('me/pinned')\n"
        "answer = probabilities(pushed)"
    )
    client.wipe_cache()
    assert client.run("answer = probabilities(MultiTaskClassifier.from_pretrained('me/pinned'))") == expected
