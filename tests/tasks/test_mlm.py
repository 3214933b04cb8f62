"""Blocks of text, masks, and the model that predicts masked tokens alone."""

import pytest
import torch
from transformers import BertForMaskedLM

from mfac_hf.tasks import mlm
from mfac_hf.tasks.toy import toy_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


def test_blocks_hold_the_text_in_order(tokenizer):
    texts = mlm.generated_texts(8, "train")
    blocks = mlm.token_blocks(texts, tokenizer, 7, 9)["input_ids"][:]
    everything = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert len(blocks) == 9 and {(len(block), block[0], block[-1]) for block in blocks} == {
        (7, tokenizer.cls_token_id, tokenizer.sep_token_id)
    }
    assert [token for block in blocks for token in block[1:-1]] == everything[: 9 * 5]


def test_text_that_is_too_short_is_refused(tokenizer):
    with pytest.raises(ValueError, match="1,000 blocks of 8 tokens: the text has"):
        mlm.token_blocks(["the film was dull ."], tokenizer, 8, 1000)
    with pytest.raises(ValueError, match="--max_seq_length 2: expected at least 3"):
        mlm.token_blocks(["the film was dull ."], tokenizer, 2, 1)


def test_generated_splits_share_no_sentence():
    train, validation = mlm.generated_texts(200, "train"), mlm.generated_texts(200, "validation")
    assert len(set(train)) == 200 == len(set(validation)) and not set(train) & set(validation)


def test_an_evaluation_is_masked_once_and_training_each_time(tokenizer):
    blocks = mlm.token_blocks(mlm.generated_texts(100, "train"), tokenizer, 16, 40)
    torch.manual_seed(1)
    first = mlm.mask_once(blocks, tokenizer)
    torch.manual_seed(2)
    assert first[:] == mlm.mask_once(blocks, tokenizer)[:]
    collate = mlm.masking_collator(tokenizer)
    masked = collate([first[i] for i in range(40)])
    assert masked["input_ids"].tolist() == first["input_ids"][:] and masked["labels"].tolist() == first["labels"][:]
    rows = [blocks[i] for i in range(40)]
    assert not torch.equal(collate(rows)["labels"], collate(rows)["labels"])
    share = (masked["labels"] != -100).float().mean()
    assert 0.1 < share < 0.2, "15 of 100 tokens"


def test_masked_positions_alone_give_the_loss_and_gradient_of_all_logits(tokenizer):
    model = mlm.mlm_model(tokenizer, seed=0, length=16, hidden_size=64, num_layers=1, dropout=0.0).double()
    reference = BertForMaskedLM(model.config).double()
    reference.load_state_dict(model.state_dict())
    blocks = mlm.token_blocks(mlm.generated_texts(100, "train"), tokenizer, 16, 8)
    batch = mlm.masking_collator(tokenizer)([blocks[i] for i in range(8)])
    losses = [one(**batch).loss for one in (model, reference)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(model(batch["input_ids"]).logits, reference(batch["input_ids"]).logits)


def test_the_seed_decides_the_weights_and_leaves_the_random_state(tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    options = {"length": 16, "hidden_size": 64, "num_layers": 1, "dropout": 0.0}
    one, same, other = (mlm.mlm_model(tokenizer, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.bert.embeddings.word_embeddings.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    with pytest.raises(ValueError, match="--hidden_size 100: expected a multiple of 64"):
        mlm.mlm_model(tokenizer, seed=0, **{**options, "hidden_size": 100})


def test_a_vocabulary_that_is_missing_or_none_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="vocab.txt: no such file"):
        mlm.read_vocabulary(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nword\n")
    with pytest.raises(ValueError, match=r"vocab.txt lacks \[MASK\]"):
        mlm.read_vocabulary(tmp_path / "vocab.txt")
