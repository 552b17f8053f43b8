"""The steps by the name that a recipe uses."""

KINDS = {
    "extract_html": "extract_html:ExtractHtml",
    "repair_unicode": "repair_unicode:RepairUnicode",
    "simplify_chinese": "simplify_chinese:SimplifyChinese",
    "language": "language:Language",
    "c4": "c4:C4",
    "gopher_quality": "gopher_quality:GopherQuality",
    "gopher_repetition": "gopher_repetition:GopherRepetition",
    "fineweb": "fineweb:FineWeb",
    "quality_classifier": "quality_classifier:QualityClassifier",
    "perplexity": "perplexity:Perplexity",
    "exact_documents": "exact_documents:ExactDocuments",
    "exact_paragraphs": "exact_paragraphs:ExactParagraphs",
    "exact_substrings": "exact_substrings:ExactSubstrings",
    "near_duplicates": "near_duplicates:NearDuplicates",
    "privacy": "privacy:Privacy",
    "decontaminate": "decontaminate:Decontaminate",
    "domains": "lists:Domains",
    "licences": "lists:Licences",
    "sample": "sample:Sample",
}
"""kind -> "module:Class", the module below megalm.curate.steps."""
