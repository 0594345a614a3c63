"""Training of the shipped models; needs the extra ``train`` and nothing else imports it."""
