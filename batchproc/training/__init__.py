"""Training of the models that are shipped; needs the extra ``train`` (PyTorch). Nothing else imports this."""
