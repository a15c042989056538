"""What a report says, whatever its form: groups, columns, sentences, laws and footnotes of records."""
