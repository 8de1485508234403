"""The words and phrases that echo-tiny reads, from inspection tasks and in no particular order."""

from __future__ import annotations

WORDS = """
a an and are as at be by can cannot does fit from has have here in into is it its less makes may more near no not of
off on once one only or other out over seen should so some such than that the then there these this through to under
up very which while will with within without what where when who how why all any both each every few most same
abnormal abrasion absence absent accurate acceptable adhesive air alignment allow along alter aluminium angle
appearance area assembly attached axis back bad ball balls band base bearing bent blade blank block blowhole blurred
body bolt bolts bore bottle break breaks bridge bright bristle broken brown bubble bulge bump burr burn cable candle
cap capacitor candidate candidates capsule carpet carrier casing cast cause causes cavity cell ceramic chain changes
channel chip chipped chips circle circuit circular clean clear cloth coating cold colour color comb combined compare
complete component concentric condition conclude connection connector contact contacts contamination copper core
corner corners corrosion cotton covered crack cracks cross crushed current curve curved cut cylinder damage damaged
dark debris deep defect defective defects deform deformed dent dents depth deposit difference different dirt dirty
discoloration discolored disc displacement dot dots drill dry dust edge edges effect effects electrical electronic
empty enamel end error even evenly exposed extra face failure fabric fade fail faint fast fastened fatigue fault
faulty fibre fill filled film fine finish fixed flake flange flat flawless fluid foil folded force foreign form
fracture fragment frame fray frayed free friction front full function gap gear generator glass glossy glue good grain
grey grid grinding grip groove ground guide hair handle hardness hazelnut head heat heavy high hole holes hollow
housing hub hydraulic ignored image impact important impurity inclusion increase indentation inner inside inspected
inspection intact intended internal iron irregular jagged joint joints large lateral layer leak leakage leaking
leather left lens level life light lighter line lines liquid load local location long loose loss lost low lower
lubricant machine magnet magnetic main mark marks material matte mechanical melted mesh metal middle misaligned
misplaced missing moisture mould mounted moved motor narrow neat nick noise noisy normal nothing number nut object
observe oil open opening operation orange outer outline outside oval oxidation oxide packaging pad paint pale panel
part particle parts patch pattern pcb permanent piece pill pin pins pipe pit pits place plain plastic plate plug point
polished poor pore porous position possible power precise present press pressure print printed product profile
protection proper protrusion pulled purpose quality race random reduced reduces reference region reliability remains
residue resistance rim right ring risk rolling roller rotation rough roughness round rows rubber rust safe safety
sagging scale scar scrap scratch scratched scratches screw screws seal sealed sealing seat section separate shadow
shaft shallow shape sharp sheet shift shiny shows short side sides sign signal silver single slot slots slight small
smear smooth socket soft solder sound speck speckles spill split spot spots spread spring squeezed stain stained
stains standard steel step stick straight strand strands streak streaks strength stress strong structure stuck surface
surfaces swapped tear teeth texture thick thin thread tile tilted tin tint tool tooth top torn toothbrush torque tough
transistor translucent trapped tube turned twisted type typical undamaged uneven uniform unit upper usable vibration
void visible wall warm warped washer water wavy weak weakens weaker wear weld wheel white wide wire wires wood worn
wrong yellow zipper zone
""".split()  # noqa: SIM905

PHRASES = (
    "Is there any defect in the object?",
    "There is a defect in the object.",
    "There are some defects in the object.",
    "What is the type of the defect?",
    "Where is the defect?",
    "What is the appearance of the defect?",
    "What is the effect of the defect?",
    "What kind of product is in the image?",
    "What is the purpose of the object?",
    "What is the appearance of the object?",
    "The image is the part under inspection.",
    "The first image is a normal part.",
    "Known conditions of this part:",
    "look for this.",
    "Observe: compare: conclude: Question: Guide: Normal: Reasoning: Candidate candidates",
    "there is no defect.",
    "Yes. No.",
)
"""Phrases from other tasks, for the tokenizer's vocabulary."""
