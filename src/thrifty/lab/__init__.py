"""The lab: small models trained from generated data, on which every method can be tried in seconds.

`tasks` makes verifiable problems of graded difficulty, `traces` writes how one may think about them, `tokenizer` builds
the model's tokenizer, `suite` turns problems into tasks of the bench. Nothing here imports torch.
"""
